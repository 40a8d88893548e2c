"""Two ranks, one of which meets rows that are not numbers: importable by name, because a spawned process imports afresh."""

import copy
import hashlib
import os

import torch
from engine_kit import feed_of, fresh, resolved, trainer_of
from rank_kit import ADAMW, X, Y, scenario

from ssl_ae import distributed
from ssl_ae.errors import NonFiniteError

BAD_STEP, LIMIT = 5, 3
MODE, SECTIONS = scenario("joint", ADAMW, clip_norm=0.5, ema=0.9, epochs=3, max_nonfinite_steps=LIMIT)


class Poisoned:
    """A feed that gives one rank a row that is not a number, at some steps."""

    def __init__(self, feed, steps, rank):
        self.feed, self.steps, self.rank = feed, steps, rank

    def batches(self, requests):
        for step, batch in enumerate(self.feed.batches(requests)):
            if step in self.steps and distributed.rank() == self.rank:
                batch.x[0, 0] = torch.nan
            yield batch


def hash_of(trainer) -> str:
    """sha256 of weights, their average and the optimizer's state."""
    digest, state = hashlib.sha256(), trainer.checkpoint()
    optimizers = [value for each in state.state["optimizers"] for one in each["state"].values() for value in one.values()]
    for value in (*state.weights.values(), *state.state["average"].values(), *optimizers):
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def trained(poison=(), rank=1, leave_out=None):
    """The hash of a run with bad rows at the steps of `poison`, or with one update undone; what was counted and said."""
    found = resolved(**SECTIONS)
    feed = feed_of(X, Y, rank=distributed.rank(), world=distributed.world())
    trainer = trainer_of(found, MODE, feed, fresh(found))
    trainer.feed = Poisoned(feed, poison, rank)
    make = trainer.make_step

    def make_and_undo(run, batches):
        before = copy.deepcopy((trainer.model.state_dict(), run.optimizer.state_dict()))
        average = trainer.stepper.average
        trainer.stepper.average = None  # it moves by the weights as they are after the update is undone
        make(run, batches)
        trainer.model.load_state_dict(before[0])
        # torch loads the rate with the state, and the schedule has moved on
        rates = [group["lr"] for group in run.optimizer.param_groups]
        run.optimizer.load_state_dict(before[1])
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        trainer.stepper.average = average
        average.update_parameters(trainer.model)

    if leave_out is not None:
        trainer.make_step = lambda run, batches: (make_and_undo if trainer.progress.step == leave_out else make)(run, batches)
    message = ""
    try:
        trainer.run()
    except NonFiniteError as error:
        message = str(error)
    return {"hash": hash_of(trainer), "skipped": int(trainer.runs[0].watch.skipped), "message": message}


def work(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    with distributed.process_group("cpu"):
        results = {
            "undisturbed": trained(),
            "left out": trained(leave_out=BAD_STEP),
            "on rank 0": trained({BAD_STEP}, rank=0),
            "on rank 1": trained({BAD_STEP}, rank=1),
            "too often": trained(set(range(BAD_STEP, BAD_STEP + LIMIT)), rank=1),
        }
    torch.save(results, folder / f"rank-{rank}.pt")
