"""The algebra: an objective is a weighted sum of terms, and a term maps a Trace to nats.

The one divisor is decided here. Every term contributes weight * value.sum() / rows[over], where `rows` counts over all ranks
and micro-batches; gradients are summed, so any split of the same rows gives the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ssl_ae.components import Regularizer
from ssl_ae.distributed import sum_over_ranks
from ssl_ae.errors import RecipeError
from ssl_ae.trace import Batch, Need, Over, Trace


@dataclass(frozen=True)
class Weight:
    """A factor that may grow linearly from 0: value * min(1, (step + 1) / warmup_steps)."""

    value: float = 1.0
    warmup_steps: int = 0

    def at(self, step: Tensor) -> Tensor | float:
        if self.warmup_steps == 0:
            return self.value
        return self.value * ((step + 1) / self.warmup_steps).clamp(max=1.0)


@dataclass(frozen=True)
class Term:
    """One summand. `of` gives (B,) for ROWS and LABELED, () for STEP and MODEL."""

    name: str
    of: Callable[[Trace], Tensor]
    over: Over = Over.ROWS
    weight: Weight = Weight()
    needs: frozenset[Need] = frozenset()

    def value(self, trace: Trace) -> Tensor:
        """What it is of each row, or of the step; where a label enters the model, its mean over the labels a row may have."""
        summed = Need.LABEL_SUM in self.needs and trace.label_sum is not None
        return trace.label_sum(self.of) if summed else self.of(trace)

    def share(self, trace: Trace, rows: Mapping[Over, Tensor]) -> Tensor:
        """This micro-batch's part of the term's global mean, unweighted: the parts add up to the mean, ()."""
        value = self.value(trace)
        if self.over in (Over.ROWS, Over.LABELED):
            if value.shape != (len(trace.batch),):
                raise RecipeError(
                    f"term {self.name!r} returned shape {tuple(value.shape)}; "
                    f"averaged over {self.over}, it must give one value a row, (B,)."
                )
            mask = trace.batch.uniform if self.over is Over.ROWS else trace.batch.labeled
            value = value.where(mask, 0.0)
        elif value.shape != ():
            raise RecipeError(
                f"term {self.name!r} returned shape {tuple(value.shape)}; averaged over {self.over}, it must give one value, ()."
            )
        value = value.to(torch.promote_types(value.dtype, torch.float32))  # bf16 counts to 256 only
        return value.sum() / rows[self.over]


@dataclass(frozen=True)
class Objective:
    """Built with `+` and `number *`."""

    terms: tuple[Term, ...] = ()

    def __add__(self, other: Objective) -> Objective:
        names = {term.name for term in self.terms}
        return Objective(self.terms + tuple(_renamed(term, names) for term in other.terms))

    def __rmul__(self, factor: float) -> Objective:
        return Objective(tuple(replace(t, weight=replace(t.weight, value=factor * t.weight.value)) for t in self.terms))

    @cached_property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(term.needs for term in self.terms))

    @cached_property
    def of_data(self) -> Objective:
        """The terms that need a forward pass."""
        return Objective(tuple(term for term in self.terms if term.over is not Over.MODEL))

    @cached_property
    def of_parameters(self) -> Objective:
        """The terms of parameters alone: added once a step, after the ranks have summed their gradients."""
        return Objective(tuple(term for term in self.terms if term.over is Over.MODEL))

    @cached_property
    def of_step_means(self) -> Objective:
        """The terms that take a mean over the whole step."""
        return Objective(tuple(term for term in self.terms if Need.STEP_MEAN in term.needs))

    def shares(self, trace: Trace, rows: Mapping[Over, Tensor]) -> Tensor:
        """(terms,) unweighted parts of each term's global mean."""
        if not self.terms:
            return torch.zeros(0)
        return torch.stack([term.share(trace, rows) for term in self.terms])

    def weigh(self, shares: Tensor, step: Tensor) -> Tensor:
        """() the weighted sum of shares (terms,)."""
        parts = [term.weight.at(step) * share for term, share in zip(self.terms, shares.unbind(), strict=True)]
        return sum(parts[1:], parts[0]) if parts else shares.new_zeros(())


def _renamed(term: Term, taken: set[str]) -> Term:
    name, count = term.name, 2
    while name in taken:
        name, count = f"{term.name}-{count}", count + 1
    taken.add(name)
    return replace(term, name=name)


def count_rows(batches: Sequence[Batch]) -> dict[Over, Tensor]:
    """How many rows each `Over` averages in this step, over all ranks and micro-batches; at least 1, so that none gives 0."""
    counts = torch.stack(
        [torch.stack([b.uniform.sum(), b.labeled.sum(), b.labeled.new_ones((), dtype=torch.int64)]) for b in batches]
    )
    rows, labeled, steps = sum_over_ranks(counts.sum(0)).clamp_min(1).unbind()
    return {Over.ROWS: rows, Over.LABELED: labeled, Over.STEP: steps, Over.MODEL: torch.ones_like(steps)}


class StepMeans:
    """Means over every uniform row of a step, exact in value and gradient over micro-batches and ranks.

    With one micro-batch a rank the sum is reduced as it is made. With several, a first pass without gradients collects the
    sums (`collecting`), and the second sees the total with its own rows' gradient. The gradient is multiplied by the number of
    forward passes, because the share of a STEP term is divided by it.
    """

    def __init__(self, rows: Mapping[Over, Tensor], several: bool) -> None:
        self.rows, self.several, self.collecting = rows, several, False
        self.totals: list[Tensor] = []
        self._calls = 0

    def begin(self) -> None:
        """Called at the start of each forward pass: means are known by the order in which a pass asks for them."""
        self._calls = 0

    def finish_collecting(self) -> None:
        self.collecting = False
        self.totals = [sum_over_ranks(total) for total in self.totals]

    def __call__(self, value: Tensor, uniform: Tensor) -> Tensor:
        """(B, *s) -> (*s)."""
        mask = uniform.view(-1, *[1] * (value.dim() - 1))
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        part = value.where(mask, 0.0).sum(0)
        index, self._calls = self._calls, self._calls + 1
        if self.collecting:
            if index == len(self.totals):
                self.totals.append(torch.zeros_like(part))
            self.totals[index] += part.detach()
            total = self.totals[index]
        else:
            total = self.totals[index] if self.several else sum_over_ranks(part.detach().clone())
        passes = self.rows[Over.STEP].to(value.dtype)
        return (total + passes * (part - part.detach())) / self.rows[Over.ROWS].to(value.dtype)


def reconstruction(trace: Trace) -> Tensor:
    """l_X = -log p(x|z) of the clean target, mean over the S draws of z, in nats, (B,)."""
    first = -trace.p_x.log_prob(trace.batch.target)
    if len(trace.draws) == 1:
        return first
    others = [-trace.decode(z).log_prob(trace.batch.target) for z in trace.draws[1:]]
    return torch.stack([first, *others]).mean(0)


def supervised(trace: Trace) -> Tensor:
    """l_Y = -log p(y|z) times the row's weight, in nats, (B,); unlabelled rows are masked by the objective.

    Soft labels give the cross-entropy -sum_c soft_c log p(c|z). Unknown targets of a labelled row are left out.
    """
    batch = trace.batch
    if batch.soft is not None:
        value = -(batch.soft * trace.p_y.logits).sum(1)  # torch stores normalised logits
    elif batch.y.dim() == 1:
        value = -trace.p_y.log_prob(batch.y.clamp_min(0))
    else:
        there = ~batch.y.isnan()
        each = trace.p_y.base_dist.log_prob(batch.y.where(there, 0.0))  # (B, T): targets are independent
        value = -each.where(there, 0.0).sum(1)
    return value * batch.weight_y


RECONSTRUCTION = Objective((Term("reconstruction", reconstruction, needs=frozenset({Need.RECONSTRUCTION, Need.LABEL_SUM})),))
SUPERVISED = Objective((Term("supervised", supervised, Over.LABELED, needs=frozenset({Need.PREDICTION})),))


def penalty(regularizer: Regularizer, weight: Weight = Weight()) -> Objective:
    return Objective((Term(regularizer.name, regularizer.penalty, regularizer.over, weight, regularizer.needs),))
