"""Differentiable heads: features -> p(y|z), for every mode."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

import ssl_ae
from ssl_ae_builtins.activations import Activation, activation


class TargetUnits(nn.Module):
    """Standardised targets inside, the user's units outside: (B, T) <-> mean and standard deviation of the labels seen."""

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(targets))
        self.register_buffer("std", torch.ones(targets))
        self.raw_std = nn.Parameter(torch.full((targets,), 0.5413))  # softplus(0.5413) = 1: one standard deviation of y

    def prepare(self, y: Tensor) -> None:
        """y (N, T), NaN where unknown. A target that never varies keeps unit scale."""
        mean = y.nanmean(0)
        std = (y - mean).square().nanmean(0).sqrt()
        self.mean.copy_(mean.nan_to_num(0.0))
        self.std.copy_(torch.where(std > 0, std, 1.0).nan_to_num(1.0))

    def forward(self, raw: Tensor) -> Distribution:
        """raw (B, T) in standard deviations -> N over targets, event shape (T,)."""
        std = (nn.functional.softplus(self.raw_std) + 1e-3) * self.std
        return Independent(Normal(self.mean + at_least_float32(raw) * self.std, std, validate_args=False), 1, validate_args=False)


def at_least_float32(raw: Tensor) -> Tensor:
    """Densities lose too much in bf16."""
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def output_of(shapes: ssl_ae.Shapes) -> TargetUnits | None:
    return TargetUnits(shapes.targets) if shapes.targets else None


class Softmax(ssl_ae.Head):
    """p(y|z) = softmax(W z + b): multinomial logistic regression on the features."""

    name = "softmax"

    def __init__(self, config: ssl_ae.Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Categorical over classes, (B,)."""
        return Categorical(logits=at_least_float32(self.linear(features)), validate_args=False)


class Mlp(ssl_ae.Head):
    """Multilayer perceptron on the features: softmax over classes, or a gaussian with learned variance over targets."""

    name = "mlp"
    tasks = frozenset({"classes", "regression"})

    class Config(ssl_ae.Config):
        widths: tuple[Annotated[int, Field(ge=1)], ...] = Field((64,), description="sizes of the hidden layers")
        activation: Activation = Field("relu", description="of the hidden layers")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        sizes = [shapes.latent, *config.widths]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation(config.activation))]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], shapes.outputs))
        self.units = output_of(shapes)

    def prepare(self, y: Tensor) -> None:
        if self.units is not None:
            self.units.prepare(y)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Categorical over classes, or Normal over targets."""
        raw = self.layers(features)
        return Categorical(logits=at_least_float32(raw), validate_args=False) if self.units is None else self.units(raw)


class Gaussian(ssl_ae.Head):
    """p(y|z) = N(W z + b, diag(s^2)): linear regression with learned noise; targets are standardised inside."""

    name = "gaussian"
    tasks = frozenset({"regression"})

    def __init__(self, config: ssl_ae.Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear, self.units = nn.Linear(shapes.latent, shapes.outputs), output_of(shapes)

    def prepare(self, y: Tensor) -> None:
        self.units.prepare(y)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Normal over targets, event shape (T,)."""
        return self.units(self.linear(features))


class BernoulliHead(ssl_ae.Head):
    """p(y_t = 1|z) = sigmoid(W z + b)_t: independent yes-or-no targets (multi-label)."""

    name = "bernoulli"
    tasks = frozenset({"multilabel"})

    def __init__(self, config: ssl_ae.Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Bernoulli over targets, event shape (T,)."""
        return Independent(Bernoulli(logits=at_least_float32(self.linear(features)), validate_args=False), 1, validate_args=False)
