"""The check that trains: three steps of the real loop on a handful of rows."""

from __future__ import annotations

import math

import torch

from ssl_ae.data.loading import Feed, Table
from ssl_ae.plan import finetuning
from ssl_ae.testing.check import Check, check, require
from ssl_ae.testing.world import Subject, World
from ssl_ae.trace import Batch
from ssl_ae.training import Trainer

STEPS, BATCH = 3, 8  # rows a step as in world.FINETUNE


def trainer_of(world: World, rows: Batch) -> Trainer:
    """A trainer of the joint plan, which minimises l_Y, l_X and every penalty, over rows in memory."""
    model, training = world.model(), world.resolved.recipe.finetune
    feed = Feed(
        Table(rows.x.numpy()), rows.y.numpy(), torch.nn.Identity(), seed=0, device=torch.device("cpu"), residency="resident"
    )
    plan = finetuning(world.resolved, model, "joint", rows=len(rows), labeled=int(rows.labeled.sum()))
    return Trainer(model, plan, feed, training, seed=0, device=torch.device("cpu"))


@check(
    "encoder",
    "decoder",
    "regularizer",
    "head",
    rule="three steps of joint training leave every term finite, skip no update and change the parameters.",
    cure="run the other checks first; then look for values that overflow, and for parameters that forward does not use.",
)
def trains(subject: Subject) -> None:
    for world in subject.worlds:
        trainer = trainer_of(world, world.sample(STEPS * BATCH).batch())
        model = trainer.model
        component = world.part(model) if list(world.part(model).parameters()) else model
        before = {name: p.detach().clone() for name, p in component.named_parameters() if p.requires_grad}
        progress = trainer.run()
        require(progress.step == STEPS, f"{world.name}: {progress.step} of {STEPS} steps were made.")
        skipped = sum(int(run.watch.skipped) for run in trainer.runs)
        require(skipped == 0, f"{world.name}: {skipped} of {STEPS} steps had a gradient that is not finite.")
        for entry in progress.history:
            wild = [name for name, value in entry.items() if not math.isfinite(value)]
            require(not wild, f"{world.name}: step {entry['step']}: {', '.join(wild)} is not finite.")
        after = dict(component.named_parameters())
        require(
            not before or any(not torch.equal(p, after[name]) for name, p in before.items()),
            f"{world.name}: no parameter changed.",
        )


CHECKS: tuple[Check, ...] = (trains,)
