"""Fully connected encoder and decoder; the decoder mirrors the encoder unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae_builtins.activations import Activation, activation
from ssl_ae_builtins.outputs import OutputConfig, OutputDecoder

Widths = tuple[Annotated[int, Field(ge=1)], ...]


class Layers(nn.Module):
    """linear -> (batch-norm) -> activation, each tapped as PREFIX1, PREFIX2, ..."""

    def __init__(self, sizes: Sequence[int], act: Activation, batch_norm: bool, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b, bias=not batch_norm), *([nn.BatchNorm1d(b)] if batch_norm else []), activation(act))
            for a, b in pairwise(sizes)
        )

    def forward(self, h: Tensor, run: ssl_ae.Pass) -> Tensor:
        """(B, sizes[0]) -> (B, sizes[-1])."""
        for i, block in enumerate(self.blocks, start=1):
            h = run.tap(block(h), f"{self.prefix}{i}")
        return h


class MlpEncoder(ssl_ae.Encoder):
    """Multilayer perceptron: h1 = f(W1 x + b1), ..., then q(z|h) (Hinton & Salakhutdinov 2006)."""

    name = "mlp"

    class Config(ssl_ae.Config):
        widths: Widths = Field((512, 256), description="sizes of the hidden layers; [] for none")
        activation: Activation = Field("relu", description="of the hidden layers")
        batch_norm: bool = Field(False, description="normalise each hidden layer before its activation (Ioffe & Szegedy 2015)")
        posterior: Posterior = Field("point", description="q(z|x): point, diag or full covariance")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        sizes = [math.prod(shapes.x), *config.widths]
        self.layers = Layers(sizes, config.activation, config.batch_norm, "h")
        self.latent = ssl_ae.Latent(sizes[-1], shapes.latent, config.posterior)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), (B, K)."""
        return self.latent(self.layers(x.flatten(1), run))

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior


class MlpDecoder(OutputDecoder):
    """Multilayer perceptron from code to p(x|z); sizes mirror the encoder's."""

    name = "mlp"

    class Config(OutputConfig):
        widths: Widths | None = Field(None, description="sizes of the hidden layers; default: the encoder's, mirrored")
        activation: Activation | None = Field(None, description="of the hidden layers; default: the encoder's, else relu")
        batch_norm: bool | None = Field(None, description="normalise each hidden layer; default: as the encoder does")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.output = config.build(shapes.x)
        sizes = [shapes.latent, *(config.widths or ())]
        self.layers = Layers(sizes, config.activation or "relu", bool(config.batch_norm), "d")
        self.linear = nn.Linear(sizes[-1], self.output.parameters_per_value * math.prod(shapes.x))

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, *shapes.x)."""
        raw = self.linear(self.layers(z, run)).unflatten(1, (self.output.parameters_per_value, *self.shapes.x))
        return self.output(raw), {}

    @classmethod
    def mirrored(cls, config: Config, encoder: ssl_ae.Config) -> Config:
        theirs = encoder.model_dump()
        fallback = {"widths": tuple(reversed(theirs.get("widths", (512, 256)))), "activation": "relu", "batch_norm": False}
        fallback |= {name: theirs[name] for name in ("activation", "batch_norm") if name in theirs}
        return config.model_copy(update={name: value for name, value in fallback.items() if getattr(config, name) is None})
