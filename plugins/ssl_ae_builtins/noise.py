"""Corruptions: the denoising criterion reconstructs the clean sample from a disturbed one (Vincent et al. 2010)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae


class GaussianNoise(ssl_ae.Regularizer):
    """h + scale * eps, eps ~ N(0, I): additive noise; the target stays clean (Vincent et al. 2010, sec. 4.1)."""

    name = "gaussian_noise"

    class Config(ssl_ae.Config):
        scale: float = Field(0.3, ge=0, description="standard deviation, in units of the layer")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return h + self.config.scale * torch.randn_like(h)


class MaskingNoise(ssl_ae.Regularizer):
    """A fraction of the numbers of each row is set to 0; the target stays clean (Vincent et al. 2010, sec. 4.1)."""

    name = "masking_noise"

    class Config(ssl_ae.Config):
        fraction: float = Field(0.25, ge=0, lt=1, description="probability that a number is set to 0")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return h * (torch.rand_like(h) >= self.config.fraction)


class Dropout(ssl_ae.Regularizer):
    """Zeroes hidden units with probability rate and scales the others by 1 / (1 - rate) (Srivastava et al. 2014)."""

    name = "dropout"
    layers = ("h*",)

    class Config(ssl_ae.Config):
        rate: float = Field(0.2, ge=0, lt=1, description="probability that a unit is dropped")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return nn.functional.dropout(h, self.config.rate, training=True)
