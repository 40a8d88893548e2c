"""The nouns every room shares: what enters a step (`Batch`), one walk through the layers (`Pass`), what it leaves (`Trace`)."""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from ssl_ae.errors import RecipeError, listing

if TYPE_CHECKING:
    from torch import nn

UNLABELED = -1


class Over(enum.StrEnum):
    """What a term is averaged over."""

    ROWS = "rows"  # (B,) over the uniformly drawn rows of the global batch
    LABELED = "labeled"  # (B,) over the rows that have a label
    STEP = "step"  # () once per forward pass, averaged over micro-batches and ranks
    MODEL = "model"  # () of parameters alone: once a step, after the ranks have agreed


class Need(enum.StrEnum):
    """What a term asks of the forward pass beyond q(z|x). Nobody pays for what no term needs."""

    RECONSTRUCTION = "reconstruction"  # the decoder runs: trace.p_x and trace.rebuilt
    PREDICTION = "prediction"  # the head runs: trace.p_y
    CLEAN = "clean"  # a second, unperturbed encoder pass: trace.clean
    INPUT_GRAD = "input_grad"  # batch.x takes part in autograd
    VIEW = "view"  # a second, differently perturbed pass: trace.view
    TEACHER = "teacher"  # the averaged (EMA) model on the unperturbed rows: trace.teacher
    GUESS = "guess"  # class probabilities that an earlier model gave the row: batch.guess
    LABEL_SUM = "label_sum"  # where a label enters the model, the term's mean over the labels a row may have; over ROWS alone
    STEP_MEAN = "step_mean"  # trace.step_mean: means over all rows of the step; only for terms over STEP


@dataclass(frozen=True)
class Shapes:
    """The sizes a component is built for."""

    x: tuple[int, ...]  # one sample: image (C, H, W), vector (D,), signal (C, T)
    latent: int  # K
    classes: int | None = None  # of a classification task
    targets: int | None = None  # T, of a regression or multi-label task

    @property
    def outputs(self) -> int:
        """Numbers a head produces per row: one logit a class, or one value a target."""
        return self.classes or self.targets or 0


@dataclass(frozen=True)
class Batch:
    """Rows of one (micro-)batch on one rank. Only `x` must be given; the rest has the defaults of unlabelled data."""

    x: Tensor  # (B, *shapes.x) float
    y: Tensor | None = None  # (B,) int64, UNLABELED = -1 | (B, T) float, NaN where unknown
    labeled: Tensor | None = None  # (B,) bool, the one truth about who has a label
    row: Tensor | None = None  # (B,) int64, position in the split
    target: Tensor | None = None  # (B, *shapes.x), what l_X compares with: the clean x unless a transform says otherwise
    uniform: Tensor | None = None  # (B,) bool, drawn uniformly from all rows; the others are extra labelled rows
    weight_y: Tensor | None = None  # (B,) weight of the row in l_Y
    soft: Tensor | None = None  # (B, C) class probabilities that replace y where given
    guess: Tensor | None = None  # (B, C) class probabilities by an earlier model, 0 in rows that it gave none; needs GUESS

    def __post_init__(self) -> None:
        rows, device = len(self.x), self.x.device
        defaults = {
            "y": lambda: torch.full((rows,), UNLABELED, device=device),
            "labeled": lambda: known(self.y),
            "row": lambda: torch.arange(rows, device=device),
            "target": lambda: self.x,
            "uniform": lambda: torch.ones(rows, dtype=torch.bool, device=device),
            "weight_y": lambda: torch.ones(rows, dtype=self.x.dtype, device=device),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())

    def __len__(self) -> int:
        return len(self.x)

    def repeated(self, times: int) -> Batch:
        """All rows again and again, (times * B)."""
        return replace(self, **{name: once_each(value, times) for name, value in vars(self).items() if value is not None})


def once_each(rows: Tensor, times: int) -> Tensor:
    """(B, *s) -> (times * B, *s)."""
    return rows.repeat(times, *[1] * (rows.dim() - 1))


def known(y: Tensor) -> Tensor:
    """(B,) bool: rows with a class, or with at least one known target."""
    return y != UNLABELED if y.dim() == 1 else ~y.isnan().all(1)


class Perturber(Protocol):
    """What a Pass asks of a regularizer."""

    layers: tuple[str, ...]

    def perturb(self, h: Tensor, layer: str) -> Tensor: ...


class Moments(Protocol):
    """What a Pass asks of the running statistics that an encoder keeps for a layer."""

    def __call__(self, h: Tensor, learn: bool, *uniform: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class Pass:
    """One walk through encoder and decoder. Each layer goes through `tap`, which perturbs, records and returns it."""

    decoder: nn.Module | None = None
    regularizers: Sequence[Perturber] = ()  # those that perturb in this pass
    taps: dict[str, Tensor] = field(default_factory=dict)
    labeled: Tensor | None = None  # (B,) bool
    condition: Tensor | None = None  # (B, C), the label, for an encoder or a decoder that is `conditional`
    stats: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # {layer: (mean, std)} that `norm` divided out
    learn: bool = True  # running statistics follow this pass: of several over one batch, the encoder's only the undisturbed one
    step: Tensor | None = None  # () int64, steps made before this one; None outside training, where schedules are over
    uniform: Tensor | None = None  # (B,) bool, rows drawn uniformly; None where all are

    def tap(self, h: Tensor, name: str) -> Tensor:
        if name in self.taps:
            raise ValueError(f"layer {name!r} was tapped twice in one pass; give each layer its own name")
        for regularizer in self.regularizers:
            if matches(name, regularizer.layers):
                h = regularizer.perturb(h, name)
        self.taps[name] = h
        return h

    def norm(self, h: Tensor, name: str, moments: Moments) -> Tensor:
        """(h - mean) / std by this pass's own statistics in training, by the running ones otherwise; then `tap`.

        Extra labelled rows are divided by statistics of their own.

        `moments` is an `ssl_ae.BatchMoments` of the component; what was divided out stays in `stats`.
        """
        mean, std = self.stats[name] = moments(h, self.learn, *(() if self.uniform is None else (self.uniform,)))
        return self.tap((h - mean) / std, name)


def matches(layer: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name fits one of the patterns, as in `h1`, `h*` or `*`."""
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Trace:
    """What one forward pass leaves for the terms of an objective."""

    model: nn.Module
    batch: Batch | None = None  # None for terms of parameters alone (Over.MODEL)
    q: Distribution | None = None  # q(z|x~), batch shape (B,), event shape (K,)
    draws: Tensor | None = None  # (S, B, K) reparametrised draws from q
    p_x: Distribution | None = None  # p(x|z), batch shape (B,), event shape shapes.x; needs RECONSTRUCTION
    p_y: Distribution | None = None  # p(y|z), batch shape (B,); needs PREDICTION
    taps: Mapping[str, Tensor] = field(default_factory=dict)  # layers as the pass saw them: "input", "h1", ..., "code"
    clean: Mapping[str, Tensor] = field(default_factory=dict)  # the same layers unperturbed; needs CLEAN
    clean_stats: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # {layer: (mean, std)} of that pass
    rebuilt: Mapping[str, Tensor] = field(default_factory=dict)  # the decoder's guess of each layer, where it makes any
    view: Trace | None = None  # needs VIEW
    teacher: Trace | None = None  # needs TEACHER; without gradient
    decode: Callable[..., Distribution] | None = None  # decode(z (B, K), condition (B, C) | None) -> p(x|z)
    encode: Callable[[Tensor], Distribution] | None = None  # encode(x) -> q(z|x): no noise, frozen statistics, differentiable
    predict: Callable[[Tensor], Distribution] | None = None  # predict(x) -> p(y|x): no noise, frozen statistics, differentiable
    step_mean: Callable[[Tensor], Tensor] | None = None  # (B, *s) -> (*s), mean over every row of the step; needs STEP_MEAN
    label_sum: LabelSum | None = None  # needs LABEL_SUM, and an encoder or decoder that is `conditional`

    @property
    def z(self) -> Tensor:
        """(B, K), the first draw."""
        return self.draws[0]

    def layers(self, patterns: Sequence[str]) -> list[Tensor]:
        """The layers whose names fit. An error when none does, because a term of nothing would pass unnoticed."""
        found = [h for name, h in self.taps.items() if matches(name, patterns)]
        if not found:
            raise RecipeError(f"layers = {list(patterns)}: no layer of the model fits; it has {listing(self.taps, 'and')}.")
        return found


@dataclass(frozen=True)
class LabelSum:
    """Every row once under each label: f(x) = sum_c w_c f(x, c), where w is certain of a known label and else q(y|x).

    Kingma et al. 2014, eq. 6 and 7: the label that nobody knows is summed out, exactly.
    """

    trace: Trace  # of (C * B) rows; row c * B + b is row b under label c
    weight: Tensor  # (C, B), adds up to 1 over the labels

    def __call__(self, term: Callable[[Trace], Tensor]) -> Tensor:
        """A term's mean over the labels, (B,)."""
        return (self.weight * term(self.trace).unflatten(0, self.weight.shape)).sum(0)
