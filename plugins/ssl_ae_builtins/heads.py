"""Differentiable heads: features -> p(y|z), for every mode."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

import ssl_ae
from ssl_ae_builtins.activations import Activation, activation

Variance = Literal["learned", "unit"]


class TargetUnits(nn.Module):
    """Standardised targets inside, the user's units outside: (B, T) <-> mean and standard deviation of the labels seen."""

    def __init__(self, targets: int, variance: Variance = "learned") -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(targets))
        self.register_buffer("std", torch.ones(targets))
        # softplus(0.5413) = 1: one standard deviation of y
        self.raw_std = nn.Parameter(torch.full((targets,), 0.5413)) if variance == "learned" else None

    def prepare(self, y: Tensor) -> None:
        """y (N, T), NaN where unknown. A target that never varies keeps unit scale."""
        mean = y.nanmean(0)
        std = (y - mean).square().nanmean(0).sqrt()
        self.mean.copy_(mean.nan_to_num(0.0))
        self.std.copy_(torch.where(std > 0, std, 1.0).nan_to_num(1.0))

    def forward(self, raw: Tensor) -> Distribution:
        """raw (B, T) in standard deviations -> N over targets, event shape (T,)."""
        relative = 1.0 if self.raw_std is None else nn.functional.softplus(self.raw_std) + 1e-3
        std = relative * self.std
        return Independent(Normal(self.mean + at_least_float32(raw) * self.std, std, validate_args=False), 1, validate_args=False)


def at_least_float32(raw: Tensor) -> Tensor:
    """Densities lose too much in bf16."""
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def residual_of_known(p_y: Distribution, batch: ssl_ae.Batch) -> Tensor:
    """(E[y|z] - y) times the row's weight, (B, T), 0 where a target is unknown."""
    return (p_y.mean - batch.y).where(~batch.y.isnan(), 0.0) * batch.weight_y[:, None]


def output_of(shapes: ssl_ae.Shapes) -> TargetUnits | None:
    return TargetUnits(shapes.targets) if shapes.targets else None


class Softmax(ssl_ae.Head):
    """p(y|z) = softmax(W z + b), multinomial logistic regression; or softmax(z), the code itself (Rasmus et al. 2015, alg. 1)."""

    name = "softmax"

    class Config(ssl_ae.Config):
        weights: bool = Field(True, description="W and b; without them the code is the logits, and latent_dim the classes")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs) if config.weights else nn.Identity()

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Categorical over classes, (B,)."""
        return self.output(self.linear(features))

    def output(self, raw: Tensor) -> Distribution:
        return Categorical(logits=at_least_float32(raw), validate_args=False)

    @classmethod
    def convex(cls, config: Config) -> bool:
        return config.weights

    def affine(self) -> nn.Linear:
        return self.linear

    def gradient(self, p_y: Distribution, batch: ssl_ae.Batch) -> Tensor:
        """p - y: the link is canonical (McCullagh & Nelder 1989, sec. 2.5)."""
        p = p_y.logits.exp()  # torch stores normalised logits
        if batch.soft is not None:
            residual = p * batch.soft.sum(1, keepdim=True) - batch.soft
        else:
            residual = p.scatter_add_(1, batch.y[:, None], p.new_full((len(p), 1), -1.0))
        return residual * batch.weight_y[:, None]

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        if config.weights:
            return []
        complaints, shapes = [], recipe.shapes
        if shapes.classes is not None and shapes.latent != shapes.classes:
            complaints.append(
                f"model.head.weights = false: the code is the logits, so latent_dim must be the {shapes.classes} classes, "
                f"but it is {shapes.latent}. Set model.latent_dim: {shapes.classes}, or weights: true."
            )
        if recipe.recipe.finetune.mode == "sequential":
            complaints.append(
                "model.head.weights = false: in sequential mode the head alone learns from labels, and this one has nothing to "
                "learn. Set finetune.mode: joint, alternate or end-to-end, or weights: true."
            )
        return complaints


class Mlp(ssl_ae.Head):
    """p(y|z) = softmax(f(z)), or N(f(z), diag(s^2)) with s learned, f a multilayer perceptron (Rumelhart et al. 1986)."""

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
    """p(y|z) = N(W z + b, diag(s^2)): linear regression; with s = 1, least mean squares (Widrow & Hoff 1960).

    Targets are standardised inside: y, W z + b and s count in standard deviations of the labels seen. With `variance: unit`,
    -log p(y|z) is 1/2 |y - W z - b|^2 and a constant; a learned s^2 divides it, so that l_Y pulls harder as the fit improves.
    """

    name = "gaussian"
    tasks = frozenset({"regression"})

    class Config(ssl_ae.Config):
        variance: Variance = Field("learned", description="s^2 of each target: learned, or 1 in units of the target's variance")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs)
        self.units = TargetUnits(shapes.targets, config.variance) if shapes.targets else None

    def prepare(self, y: Tensor) -> None:
        self.units.prepare(y)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Normal over targets, event shape (T,)."""
        return self.output(self.linear(features))

    def output(self, raw: Tensor) -> Distribution:
        return self.units(raw)

    @classmethod
    def convex(cls, config: Config) -> bool:
        return config.variance == "unit"  # a learned s^2 is one more parameter, in which l_Y is not convex

    def affine(self) -> nn.Linear:
        return self.linear

    def gradient(self, p_y: Distribution, batch: ssl_ae.Batch) -> Tensor:
        """W z + b - y', in standard deviations of the labels."""
        return residual_of_known(p_y, batch) / self.units.std


class BernoulliHead(ssl_ae.Head):
    """p(y_t = 1|z) = sigmoid(W z + b)_t: independent yes-or-no targets, multi-label (Cox 1958)."""

    name = "bernoulli"
    tasks = frozenset({"multilabel"})

    def __init__(self, config: ssl_ae.Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(shapes.latent, shapes.outputs)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Bernoulli over targets, event shape (T,)."""
        return self.output(self.linear(features))

    def output(self, raw: Tensor) -> Distribution:
        return Independent(Bernoulli(logits=at_least_float32(raw), validate_args=False), 1, validate_args=False)

    @classmethod
    def convex(cls, config: ssl_ae.Config) -> bool:
        return True

    def affine(self) -> nn.Linear:
        return self.linear

    def gradient(self, p_y: Distribution, batch: ssl_ae.Batch) -> Tensor:
        """p - y: the link is canonical."""
        return residual_of_known(p_y, batch)
