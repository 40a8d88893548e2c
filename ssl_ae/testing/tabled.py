"""Checks of heads that are fitted at once on the table of latents."""

from __future__ import annotations

import torch

from ssl_ae.model import build
from ssl_ae.testing.check import Check, check, require
from ssl_ae.testing.world import Sample, Subject, fit
from ssl_ae.trace import UNLABELED

LABELED, UNLABELED_OF_ONE = 50, 60  # rows: ten labels a class; more unlabelled rows of class 0 than labels


@check(
    "table head",
    rule="y = UNLABELED (-1), or NaN, means that the label is unknown: it is neither a class of its own nor the last class.",
    cure="fit on the rows with `y != ssl_ae.UNLABELED`; the others may at most tell where latents lie.",
)
def unlabeled(subject: Subject) -> None:
    for world in subject.worlds:
        model = build(world.resolved, head=True)
        sample = world.sample(LABELED)
        first = sample[torch.arange(LABELED) % 5 == 0]  # of class 0, where the task has classes
        more = 2.0 * first.z.repeat(UNLABELED_OF_ONE // len(first), 1)  # twice as far out, where every other class is farther
        more = more + 0.1 * torch.randn(more.shape)
        unknown = torch.full((len(more), *sample.y.shape[1:]), UNLABELED if world.task == "classes" else torch.nan).to(sample.y)
        x = first.x.repeat(len(more) // len(first), *[1] * (first.x.dim() - 1))
        fit(model.head, Sample(torch.cat([sample.x, x]), torch.cat([sample.z, more]), torch.cat([sample.y, unknown])))
        predicted = model.p_y(more, x)
        if world.task == "classes":
            wrong = int((predicted.logits.argmax(1) != 0).sum())
            require(
                wrong == 0, f"{world.name}: {wrong} of {len(more)} unlabelled rows nearest to class 0 were given another class."
            )
        else:
            finite = bool(predicted.mean.isfinite().all())
            require(finite, f"{world.name}: unknown targets made the predictions not finite.")


@check(
    "table head",
    rule="fitted on clusters that lie far apart, with ten labels in each, it predicts the class of every row.",
    cure="check that y indexes the columns of the logits: class c is logits[:, c].",
)
def learns(subject: Subject) -> None:
    for world in subject.worlds:
        if world.task != "classes":
            continue
        model = build(world.resolved, head=True)
        seen, fresh = world.sample(LABELED), world.sample(101)
        fit(model.head, seen)
        wrong = int((model.p_y(fresh.z, fresh.x).logits.argmax(1) != fresh.y).sum())
        require(wrong == 0, f"{world.name}: {wrong} of {len(fresh)} rows were given another class.")


CHECKS: tuple[Check, ...] = (unlabeled, learns)
