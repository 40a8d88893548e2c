"""Convolutional encoder and decoder for images (C, H, W) and signals (C, T) of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae_builtins.activations import Activation, activation
from ssl_ae_builtins.outputs import OutputConfig, OutputDecoder

Channels = tuple[Annotated[int, Field(ge=1)], ...]
STRIDE = 2


class Transposed2d(nn.ConvTranspose2d):
    """Adds its bias by itself: with it, oneDNN takes twice as long for the layer's gradients."""

    def forward(self, x: Tensor) -> Tensor:
        raw = nn.functional.conv_transpose2d(x, self.weight, None, self.stride, self.padding, self.output_padding)
        return raw + self.bias.to(raw.dtype).view(-1, 1, 1)


class Contiguous(nn.Module):
    """The usual layout. Before the activation of a layer that will be flattened: its gradient will come in that layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


_CONV = {1: nn.Conv1d, 2: nn.Conv2d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: Transposed2d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def grids(shape: tuple[int, ...], layers: int) -> list[tuple[int, ...]]:
    """Spatial sizes before and after each layer: half, rounded up, at every one."""
    sizes = [shape[1:]]
    for _ in range(layers):
        sizes.append(tuple(-(-n // STRIDE) for n in sizes[-1]))
    return sizes


def _channels_last(x: Tensor) -> Tensor:
    """Images with the channels of a pixel side by side in memory, as a processor's convolutions want them; the same numbers.

    Always a copy: from the strides of a single channel torch could not tell which layout is meant.
    """
    if x.dim() != 4 or x.device.type != "cpu":
        return x
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _complaints(what: str, recipe) -> list[str]:
    shape = recipe.shapes.x
    if len(shape) - 1 in _CONV:
        return []
    return [f"model.{what}.name = conv: needs images (C, H, W) or signals (C, T), but a sample has shape {shape}. Use mlp."]


class ConvEncoder(ssl_ae.Encoder):
    """Strided convolutions, then q(z|h) (Masci et al. 2011, without pooling)."""

    name = "conv"

    class Config(ssl_ae.Config):
        channels: Channels = Field((32, 64), min_length=1, description="feature maps of each layer; each halves the image")
        kernel: int = Field(3, ge=1, description="side of the kernels, odd")
        activation: Activation = Field("relu", description="of the layers")
        batch_norm: bool = Field(False, description="normalise each layer before its activation")
        posterior: Posterior = Field("point", description="q(z|x): point, diag or full covariance")

        @field_validator("kernel")
        @classmethod
        def _odd(cls, kernel: int) -> int:
            if kernel % 2 == 0:
                raise ValueError("the kernel must be odd, so that a layer halves the image exactly")
            return kernel

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        dims = len(shapes.x) - 1
        sizes = [shapes.x[0], *config.channels]
        last = len(config.channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _CONV[dims](a, b, config.kernel, stride=STRIDE, padding=config.kernel // 2, bias=not config.batch_norm),
                *([_NORM[dims](b)] if config.batch_norm else []),
                *([Contiguous()] if i == last else []),
                activation(config.activation),
            )
            for i, (a, b) in enumerate(pairwise(sizes), start=1)
        )
        features = sizes[-1] * math.prod(grids(shapes.x, len(config.channels))[-1])
        self.latent = ssl_ae.Latent(features, shapes.latent, config.posterior)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, C, *grid) -> q(z|x), (B, K)."""
        x = _channels_last(x)
        for i, block in enumerate(self.blocks, start=1):
            x = run.tap(block(x), f"h{i}")
        return self.latent(x.flatten(1))

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        yield ssl_ae.Tiles("filters", "Filters of the first layer: the kernels of its feature maps", self.blocks[0][0].weight)

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        return ("h*",) if config.activation == "sigmoid" else ()

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        return _complaints("encoder", recipe)


class ConvDecoder(OutputDecoder):
    """Transposed convolutions from code to p(x|z) (Dumoulin & Visin 2016, ch. 4); channels mirror the encoder's."""

    name = "conv"

    class Config(OutputConfig):
        channels: Channels | None = Field(
            None, min_length=1, description="feature maps of each layer; default: the encoder's, mirrored"
        )
        kernel: int | None = Field(None, ge=1, description="side of the kernels, odd; default: the encoder's, else 3")
        activation: Activation | None = Field(None, description="of the layers; default: the encoder's, else relu")
        batch_norm: bool | None = Field(None, description="normalise each layer; default: as the encoder does")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        dims = len(shapes.x) - 1
        self.output = config.build(shapes.x)
        channels, kernel = config.channels or (64, 32), config.kernel or 3
        sizes = [*channels, self.output.parameters_per_value * shapes.x[0]]
        grid = grids(shapes.x, len(channels))[::-1]
        self.start = (channels[0], *grid[0])
        self.linear = nn.Linear(shapes.latent, math.prod(self.start))
        self.first = activation(config.activation or "relu")
        self.blocks = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise(sizes)):
            last = i == len(channels) - 1
            # stride 2 maps n to 2n - 1 with an odd kernel and padding k // 2; output padding restores even sizes
            extra = tuple(wanted - (STRIDE * n - 1) for n, wanted in zip(grid[i], grid[i + 1], strict=True))
            layers = [_TRANSPOSED[dims](a, b, kernel, stride=STRIDE, padding=kernel // 2, output_padding=extra)]
            if not last:
                layers += [_NORM[dims](b)] if config.batch_norm else []
                layers += [activation(config.activation or "relu")]
            self.blocks.append(nn.Sequential(*layers))

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, C, *grid)."""
        h = run.tap(self.first(self.linear(z)).unflatten(1, self.start), "d1")
        h = _channels_last(h)
        for i, block in enumerate(self.blocks[:-1], start=2):
            h = run.tap(block(h), f"d{i}")
        raw = self.blocks[-1](h).contiguous()
        return self.output(raw.unflatten(1, (self.output.parameters_per_value, self.shapes.x[0]))), {}

    @classmethod
    def mirrored(cls, config: Config, encoder: ssl_ae.Config) -> Config:
        theirs = encoder.model_dump()
        fallback = {
            "channels": tuple(reversed(theirs.get("channels", (32, 64)))),
            "kernel": 3,
            "activation": "relu",
            "batch_norm": False,
        }
        fallback |= {name: theirs[name] for name in ("kernel", "activation", "batch_norm") if name in theirs}
        return config.model_copy(update={name: value for name, value in fallback.items() if getattr(config, name) is None})

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        complaints = [*super().check(config, recipe), *_complaints("decoder", recipe)]
        if config.kernel is not None and config.kernel % 2 == 0:
            complaints.append(f"model.decoder.kernel = {config.kernel}: the kernel must be odd.")
        return complaints
