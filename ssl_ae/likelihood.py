"""Output distributions p(x|z): how a decoder's last layer becomes a density over samples.

Values are in nats per row with their constants, so that fixed and learned variances compare:
the gaussian with unit variance is 1/2 |x - x^|^2 + D/2 log 2 pi, not the bare squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

Name = Literal["gaussian", "bernoulli", "categorical"]
Variance = Literal["unit", "scalar", "feature", "decoder"]

UNIT_INTERVAL = frozenset({"bernoulli", "categorical"})  # families whose x must lie in [0, 1]
SMALLEST_STD = 1e-3  # a learned standard deviation may not collapse onto pixels that never vary
BLOCK = 2**17  # numbers whose density is computed together: what comes in between stays in a core's cache


class Likelihood(nn.Module):
    """raw (B, P, *shape) -> p(x|z) with batch shape (B,) and event shape `shape`.

    gaussian     mean raw[:, 0]; variance `unit`, learned and shared (`scalar`), learned for each number (`feature`),
                 or given by the decoder for each row and number (`decoder`, P = 2)
    bernoulli    logits raw[:, 0]; x in [0, 1]
    categorical  P = levels logits; x in [0, 1] stands for the level round(x (levels - 1))
    """

    def __init__(self, name: Name, shape: tuple[int, ...], variance: Variance = "unit", levels: int = 256) -> None:
        super().__init__()
        self.name, self.shape, self.variance, self.levels = name, shape, variance, levels
        self.parameters_per_value = {"categorical": levels, "bernoulli": 1, "gaussian": 2 if variance == "decoder" else 1}[name]
        if name == "gaussian" and variance in ("scalar", "feature"):
            # softplus(0.5413) = 1: training starts from the unit variance
            size = math.prod(shape) if variance == "feature" else 1
            # one dimension, like a bias: weight decay and penalties of weights are for parameters of two and more
            self.raw_std = nn.Parameter(torch.full((size,), math.log(math.e - 1.0)))

    def forward(self, raw: Tensor) -> Distribution:
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))  # densities lose too much in bf16
        dims = len(self.shape)
        if self.name == "categorical":
            return Levels(raw.movedim(1, -1), dims)
        # raw[:, 0] would pad its gradient with zeros, a pass over everything
        first, *second = raw.unbind(1) if self.parameters_per_value > 1 else [raw.squeeze(1)]
        if self.name == "bernoulli":
            return IndependentBernoulli(first, dims)
        return IndependentNormal(first, self._std(first, *second), dims)

    def _std(self, mean: Tensor, unbounded: Tensor | None = None) -> Tensor:
        if self.variance == "unit":
            return mean.new_ones(())
        if self.variance != "decoder":
            unbounded = self.raw_std.view(self.shape) if self.variance == "feature" else self.raw_std
        return nn.functional.softplus(unbounded) + SMALLEST_STD


class IndependentBernoulli(Independent):
    """Independent Bernoulli for each number of a sample, x in [0, 1]: sum x log p + (1 - x) log(1 - p), from logits."""

    def __init__(self, logits: Tensor, dims: int) -> None:
        super().__init__(Bernoulli(logits=logits, validate_args=False), dims, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B,)."""
        logits = self.base_dist.logits
        if x.shape != logits.shape:
            return super().log_prob(x)
        return -_in_blocks(lambda x, logits: cross_entropy(logits, x, reduction="none"), x, logits)


class IndependentNormal(Independent):
    """Independent Normal for each number of a sample: -1/2 |(x - mean) / std|^2 - sum log std - D/2 log 2 pi."""

    def __init__(self, mean: Tensor, std: Tensor, dims: int) -> None:
        """mean (B, *shape); std of any shape that broadcasts to it."""
        super().__init__(Normal(mean, std, validate_args=False), dims, validate_args=False)
        self.std = std

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B,)."""
        mean, std = self.base_dist.loc, self.base_dist.scale
        if x.shape != mean.shape:
            return super().log_prob(x)
        distance = _in_blocks(lambda x, mean, std: ((x - mean) / std).square(), x, mean, std)
        shape = mean.shape if self.std.dim() == mean.dim() else self.event_shape  # the logarithm once, not once a row
        log_std = self.std.log().expand(shape).flatten(-len(self.event_shape)).sum(-1)
        return -0.5 * distance - log_std - 0.5 * math.log(2 * math.pi) * self.event_shape.numel()


def _in_blocks(each: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """sum of each(*rows) over the numbers of a sample, (B,). On a CPU a few rows at a time, because its cache is small."""
    count = -(-rows[0].numel() // BLOCK) if rows[0].device.type == "cpu" else 1
    if count <= 1:
        return each(*rows).flatten(1).sum(1)
    size = -(-len(rows[0]) // count)
    return torch.cat([each(*part).flatten(1).sum(1) for part in zip(*(t.split(size) for t in rows), strict=True)])


class Levels(Distribution):
    """Independent multinoulli over L equally spaced levels of [0, 1] for each number of a sample."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, logits: Tensor, dims: int) -> None:
        self.levels = Categorical(logits=logits, validate_args=False)  # (B, *shape, L)
        split = logits.dim() - 1 - dims
        super().__init__(logits.shape[:split], logits.shape[split:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected value of x, (B, *shape)."""
        count = self.levels.logits.shape[-1]
        return self.levels.probs @ torch.linspace(0, 1, count, device=self.levels.logits.device, dtype=self.levels.logits.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        level = (x * (self.levels.logits.shape[-1] - 1)).round().long()
        return self.levels.log_prob(level).flatten(len(self.batch_shape)).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.levels.sample(sample_shape) / (self.levels.logits.shape[-1] - 1)
