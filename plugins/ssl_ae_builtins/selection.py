"""Which of several classifiers labels speak for, when each label was predicted by models that had not seen it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import ssl_ae

FEWEST = 10  # labels that choose
SURE = 1.0  # standard errors by which a candidate must be better than a simpler one


@dataclass(frozen=True)
class Losses:
    """What held-out labels (L,) cost a candidate, each the mean over the times it was held out."""

    error: Tensor
    nll: Tensor  # nats
    brier: Tensor


@dataclass(frozen=True)
class Choice:
    """What is taken, and why."""

    taken: str
    labels: int
    losses: Mapping[str, Losses]  # of the candidates, simple ones first; empty where labels are too few
    reason: str = ""

    def findings(self, of_latents: Set[str]) -> ssl_ae.Findings:
        """As users are told; `of_latents` are the candidates that read latents."""
        columns = ("head auto", "accuracy", "log-loss", "Brier score", "")
        rows = tuple(
            (shown(name), percent(1 - each.error), number(each.nll), number(each.brier), "taken" if name == self.taken else "")
            for name, each in self.losses.items()
        )
        metrics = {
            f"head/{name}/{key}": value
            for name, each in self.losses.items()
            for key, value in {**summary(each), "taken": float(name == self.taken)}.items()
        }
        warnings = [] if self.losses else [f"head auto keeps {shown(self.taken)}: {self.reason}."]
        if self.losses and self.taken not in of_latents:
            best = min(
                (name for name in self.losses if name in of_latents), key=lambda name: float(self.losses[name].brier.mean())
            )
            gap = difference(self.losses[best].brier, self.losses[self.taken].brier)
            warnings.append(
                f"the latents were no help: on held-out labels {shown(best)}, the best candidate that reads them, is not surely "
                f"better than {shown(self.taken)}, which head auto took (Brier scores differ by {gap[0]:+.3f} ± {gap[1]:.3f})."
            )
        said = (f"head auto took {shown(self.taken)}: {self.reason}.",) if self.losses else ()
        title = f"{self.labels:,} labels, held out in turn, mean ± standard error"
        return ssl_ae.Findings(title, columns, rows, said, tuple(warnings), metrics)


def too_few(y: Tensor, simplest: str) -> Choice | None:
    """The choice where labels y (L,) cannot choose: fewer than 10, or no second class that can be held out and learned from."""
    several = int((torch.bincount(y) > 1).sum())
    if len(y) >= FEWEST and several >= 2:
        return None
    reason = (
        f"{len(y)} labels are too few to choose by (10 are needed)"
        if len(y) < FEWEST
        else "fewer than two classes have two labels"
    )
    return Choice(simplest, len(y), {}, reason)


def choose(held_out: Mapping[str, Tensor], y: Tensor) -> Choice:
    """From probabilities (R, L, C) of held-out labels y (L,) by candidates, simple ones first.

    One is taken where its Brier score is better than that of the one taken before by more than the standard error of their
    difference over labels.
    """
    losses = {name: measured(p, y) for name, p in held_out.items()}
    first, *others = losses
    taken, reason = first, "no candidate is surely better than this, the simplest"
    for name in others:
        mean, error = difference(losses[taken].brier, losses[name].brier)
        if mean > SURE * error:
            reason = f"its Brier score on held-out labels is better by {mean:.3f} ± {error:.3f} than that of {shown(taken)}"
            taken = name
    return Choice(taken, len(y), losses, reason)


def measured(p: Tensor, y: Tensor) -> Losses:
    """Losses of probabilities (R, L, C) at labels y (L,), each (L,)."""
    truth = one_hot(y, p.shape[2])
    of_truth = (p * truth).sum(2)
    return Losses(
        error=(p.argmax(2) != y).float().mean(0),
        nll=-of_truth.log().mean(0),
        brier=(p - truth).square().sum(2).mean(0),
    )


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a - b over labels, and its standard error."""
    return mean_and_error(a - b)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def stratified(y: Tensor, folds: int, repeats: int) -> Tensor:
    """Which fold each label is held out in, (R, L): of each class and of all, folds differ by one label at most."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(repeats):
        order = torch.randperm(len(y), generator=generator)
        order = order[y[order].argsort(stable=True)]
        parts.append(torch.empty_like(y).scatter_(0, order, torch.arange(len(y)) % min(folds, len(y))))
    return torch.stack(parts)


def summary(losses: Losses) -> dict[str, float]:
    found = {"accuracy": 1 - losses.error, "nll": losses.nll, "brier": losses.brier}
    return {
        f"{name}{end}": value
        for name, each in found.items()
        for end, value in zip(("", "_se"), mean_and_error(each), strict=True)
    }


def shown(name: str) -> str:
    return " on ".join(name.rsplit("-", 1))


def percent(values: Tensor) -> str:
    mean, error = mean_and_error(100 * values)
    return f"{mean:.1f} ± {error:.1f} %"


def number(values: Tensor) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"
