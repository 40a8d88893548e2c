"""Corruptions: the denoising criterion reconstructs the clean sample from a disturbed one (Vincent et al. 2010)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae
from ssl_ae.trace import matches


class GaussianNoise(ssl_ae.Regularizer):
    """h + scale * eps, eps ~ N(0, I): additive noise; the target stays clean (Vincent et al. 2010, sec. 3.3)."""

    name = "gaussian_noise"

    class Config(ssl_ae.Config):
        scale: float = Field(0.3, ge=0, description="standard deviation, in units of the layer")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return h + self.config.scale * torch.randn_like(h)


class MaskingNoise(ssl_ae.Regularizer):
    """A fraction of the numbers of each row is set to 0; the target stays clean (Vincent et al. 2010, sec. 3.3)."""

    name = "masking_noise"

    class Config(ssl_ae.Config):
        fraction: float = Field(0.25, ge=0, lt=1, description="probability that a number is set to 0")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return h * (torch.rand_like(h) >= self.config.fraction)


class SaltPepper(ssl_ae.Regularizer):
    """A fraction of the numbers of each row becomes low or high, at equal odds; the target stays clean (Vincent et al. 2010).

    Its section 3.3. low and high are the smallest and the largest number a sample may hold: 0 and 1 for images, which
    data.scale: range brings there. Standardised columns have no such ends: choose both, in standard deviations.
    """

    name = "salt_pepper"

    class Config(ssl_ae.Config):
        fraction: float = Field(0.25, ge=0, le=1, description="probability that a number is replaced")
        low: float = Field(0.0, allow_inf_nan=False, description="pepper: the smallest number a sample may hold, after scaling")
        high: float = Field(1.0, allow_inf_nan=False, description="salt: the largest number a sample may hold, after scaling")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """A copy of h, of any shape."""
        draw = torch.rand(h.shape, device=h.device)  # in float32 whatever h is: fractions of bf16 come in steps of 1/256
        half = self.config.fraction / 2
        return h.masked_fill(draw < half, self.config.low).masked_fill(draw >= 1 - half, self.config.high)

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        if config.low >= config.high:
            yield f"salt_pepper.low = {config.low:g} is not below high = {config.high:g}. Swap them."
            return
        own = next((part for part in recipe.regularizers if part.config is config), None)
        if own is not None and own.layers is not None and not matches("input", own.layers):
            return  # nobody knows the range of a hidden layer
        ends = recipe.x_range
        for name, end in zip(("low", "high"), ends, strict=True):
            value, chosen = getattr(config, name), name in config.model_fields_set
            if math.isinf(end) and not chosen:
                yield (
                    f"salt_pepper.{name}: data.scale = {recipe.scale} leaves samples without a {name}est number. "
                    f"Set {name}, in standard deviations, such as {-3 if name == 'low' else 3}, or take gaussian_noise."
                )
            elif not ends[0] <= value <= ends[1] or (value != end and not chosen):
                yield (
                    f"salt_pepper.{name} = {value:g}: samples lie in [{ends[0]:g}, {ends[1]:g}]. "
                    f"Set {name}: {end:g}, or data.scale: range."
                )


class ColumnSwap(ssl_ae.Regularizer):
    """A fraction of the numbers of each row is replaced by other rows' in the same column (VIME, Yoon et al. 2020, eq. 3).

    m * x + (1 - m) * x_other, each number of x_other from a row of the batch of its own: a draw from the column's distribution
    that leaves each column's own as it is. For tables, whose columns have no common unit of noise. The
    target stays clean.
    """

    name = "column_swap"

    class Config(ssl_ae.Config):
        fraction: float = Field(0.15, gt=0, le=1, description="probability that a number is replaced")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """A copy of h, (B, *s); a row without company stays as it is."""
        flat = h.flatten(1)
        rows = len(flat)
        further = torch.randint(1, max(rows, 2), flat.shape, device=h.device)
        other = (torch.arange(rows, device=h.device)[:, None] + further) % max(rows, 1)
        swapped = torch.rand(flat.shape, device=h.device) < self.config.fraction
        return torch.where(swapped, flat.gather(0, other), flat).view_as(h)

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        shape = recipe.shapes.x
        if len(shape) != 1:
            yield (
                f"column_swap needs columns that mean the same in every row, but a sample has shape {shape}. "
                "Take masking_noise, or distortion for images, or remove column_swap."
            )


class Dropout(ssl_ae.Regularizer):
    """Zeroes hidden units with probability rate and scales the others by 1 / (1 - rate) (Srivastava et al. 2014)."""

    name = "dropout"
    layers = ("h*",)

    class Config(ssl_ae.Config):
        rate: float = Field(0.2, ge=0, lt=1, description="probability that a unit is dropped")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return nn.functional.dropout(h, self.config.rate, training=True)
