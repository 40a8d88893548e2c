"""The plainest components there are: what a component under test is put together with."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from ssl_ae.components import Config, Decoder, Encoder, Head
from ssl_ae.hookspecs import hookimpl
from ssl_ae.latent import Latent, Posterior
from ssl_ae.likelihood import Likelihood
from ssl_ae.trace import Pass, Shapes

WIDTH = 29


class PlainEncoder(Encoder):
    """h1 = tanh(W x + b), then q(z|h1)."""

    name = "plain"

    class Config(Config):
        posterior: Posterior = Field("point", description="q(z|x)")

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(math.prod(shapes.x), WIDTH)
        self.latent = Latent(WIDTH, shapes.latent, config.posterior)

    def forward(self, x: Tensor, run: Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), (B, K)."""
        return self.latent(run.tap(self.linear(x.flatten(1)).tanh(), "h1"))

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior


class PlainDecoder(Decoder):
    """N(W z + b, I)."""

    name = "plain"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, math.prod(shapes.x))
        self.output = Likelihood("gaussian", shapes.x)

    def forward(self, z: Tensor, run: Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, *shapes.x)."""
        return self.output(self.linear(z).unflatten(1, (1, *self.shapes.x))), {}


class PlainHead(Head):
    """Categorical(W z + b) over classes, N(W z + b, I) over targets."""

    name = "plain"
    tasks = frozenset({"classes", "regression", "multilabel"})

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> p(y|z)."""
        raw = self.linear(features).float()
        if self.shapes.classes:
            return Categorical(logits=raw, validate_args=False)
        return Independent(Normal(raw, torch.ones(()), validate_args=False), 1, validate_args=False)


class Plugin:
    """The companions as a plugin."""

    @hookimpl
    def ssl_ae_encoders(self) -> list[type[Encoder]]:
        return [PlainEncoder]

    @hookimpl
    def ssl_ae_decoders(self) -> list[type[Decoder]]:
        return [PlainDecoder]

    @hookimpl
    def ssl_ae_heads(self) -> list[type[Head]]:
        return [PlainHead]
