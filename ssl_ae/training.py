"""The loop around the steps: it asks the plan what to minimise and the feed on what, reads, validates, saves, and stops."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssl_ae import distributed
from ssl_ae.checkpoint import Checkpoint
from ssl_ae.data.loading import Feed
from ssl_ae.errors import RecipeError, Stopped, did_you_mean, listing
from ssl_ae.model import Model
from ssl_ae.objective import Objective
from ssl_ae.optimizing import go_on
from ssl_ae.plan import Phase, Plan
from ssl_ae.recipe import Training
from ssl_ae.stepping import PhaseRun, Stepper, micro_batches, part_of
from ssl_ae.stopping import stop_signals
from ssl_ae.trace import Batch


@dataclass
class Progress:
    """What a run has reached; JSON in every checkpoint."""

    step: int = 0
    epoch: int = 0
    best: float | None = None  # of the metric that early stopping watches
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # one entry a reading: step, metrics by name
    found: dict[str, float] = field(default_factory=dict)  # measured beside the steps


class Listener:
    """Who is told about progress. The defaults say nothing."""

    def stepped(self, step: int, rows: int) -> None: ...

    def measured(self, step: int, values: dict[str, float]) -> None: ...

    def epoch_ended(self, epoch: int, step: int, values: dict[str, float]) -> None: ...

    def warned(self, message: str) -> None: ...


class Trainer:
    """Trains `model` by `plan`. Randomness of a step comes from (seed, step, rank) alone, so a resumed run goes on to the bit."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        feed: Feed,
        training: Training,
        *,
        seed: int,
        device: torch.device,
        bf16: bool = False,
        compile_step: bool = False,
        replay: bool = False,
        shards: bool = False,
        validate: Callable[[Model, Objective], dict[str, float]] = lambda model, objective: {},
        save: Callable[[Checkpoint], None] = lambda checkpoint: None,
        listener: Listener | None = None,
    ) -> None:
        self.model, self.plan, self.feed, self.training = model.to(device), plan, feed, training
        self._whole = copy.deepcopy(model).cpu() if shards and distributed.world() > 1 else None
        self.device = device
        self.validate, self.save, self.listener = validate, save, listener or Listener()
        self.progress = Progress()
        self._best_weights: dict[str, Tensor] = {}  # of the best epoch, where early stopping watches one
        self.stepper = Stepper(
            model,
            training,
            seed=seed,
            device=device,
            bf16=bf16,
            compile_step=compile_step,
            replay=replay,
            shards=shards,
            warn=self.listener.warned,
        )
        self.runs = [self.stepper.prepare(phase, plan.steps_of(phase)) for phase in plan.phases]

    @property
    def result(self) -> Model:
        """What is judged and kept: the average where the recipe asks for one."""
        return self.stepper.average.module if self.stepper.average else self.model

    def kept(self) -> Model:
        """`result`, whole on every rank, which must all ask for it."""
        if self._whole is None:
            return self.result
        self._whole.load_state_dict(distributed.gather(self.model.state_dict(), everywhere=True))
        return self._whole.to(self.device)

    def run(self) -> Progress:
        """Train to the plan's end, or to early stopping, which keeps the weights of the best epoch.

        Raises Stopped after saving, NonFiniteError.
        """
        if not self._patience_is_over():  # else it was killed after its last checkpoint
            try:
                self._run()
            except ValueError as error:
                self._tell_of_single_rows(error)
                raise
        if self._best_weights:
            self.result.load_state_dict(self._best_weights)
        return self.progress

    def _tell_of_single_rows(self, error: ValueError) -> None:
        """Raises RecipeError where torch found a part of a batch too small for its layers, which it says in words alone."""
        if "more than 1 value per channel" not in str(error):
            return
        draw = self.runs[self.plan.at(self.progress.step)[0]].phase.draw
        raise RecipeError(
            f"batch_size: of {draw.uniform + draw.labeled} rows over {distributed.world()} ranks in "
            f"micro_batches = {self.training.micro_batches} a part has a single one, which batch normalisation cannot "
            "normalise. Raise batch_size, take fewer ranks or micro_batches, or set batch_norm: false."
        ) from error

    def check_early_stopping(self) -> None:
        """Raises RecipeError where it watches what validation will not measure: now, not after an epoch."""
        if self.training.early_stopping is not None:
            self._watched(self._judge(self.plan.ending(self.plan.epochs)))

    def _run(self) -> None:
        last = self.plan.steps
        requests = ((self.runs[phase].phase.draw, k) for phase, k in map(self.plan.at, range(self.progress.step, last)))
        ends = {self.plan.epoch_end(epoch): epoch for epoch in range(1, self.plan.epochs + 1)}
        started = time.monotonic() - self.progress.seconds
        with stop_signals() as asked_to_stop, closing(distributed.Agreement()) as agreement:
            for batch in self.feed.batches(requests):
                step, run = self.progress.step, self.runs[self.plan.at(self.progress.step)[0]]
                self.make_step(run, micro_batches(batch, self.training.micro_batches))
                self.progress.step = step + 1
                self.progress.seconds = time.monotonic() - started
                self.listener.stepped(step + 1, run.phase.draw.uniform + run.phase.draw.labeled)
                reading = (step + 1) % self.training.log_every == 0
                if reading or step + 1 in ends:
                    self._read()
                if step + 1 in ends and self._end_epoch(ends[step + 1]):
                    break
                if agreement.asked(asked_to_stop.is_set(), step + 1):
                    self.save(self.checkpoint())
                    raise Stopped(f"stopped after step {step + 1} of {last}; the place is saved. Run the same command to go on.")

    def make_step(self, run: PhaseRun, batches: Sequence[Batch]) -> None:
        """One optimizer step over micro-batches. The host never waits for the device here."""
        self.stepper.make(run, batches, self.progress.step)

    def _read(self) -> None:
        """The one place that waits for the device: sums over ranks, told to the listener, checked for non-finite steps."""
        skipped = sum(int(each.watch.skipped) for each in self.runs)
        for each in self.runs:
            steps = int(each.steps)
            values = {"train/skipped_steps": float(skipped)} if skipped else {}
            if steps:
                sums = distributed.sum_over_ranks(each.shares.clone()).cpu().double() / steps
                start = f"train/{each.phase.prefix}"
                values |= {f"{start}{name}": float(value) for name, value in zip(each.terms, sums, strict=True)}
                values["train/lr"] = float(each.optimizer.param_groups[0]["lr"])
            if values:
                self.progress.history.append({"step": self.progress.step, **values})
                self.listener.measured(self.progress.step, values)
            each.shares.zero_()
            each.steps.zero_()
        for each in self.runs:
            suspect = distributed.first_over_ranks(each.watch.suspect)
            each.watch.check(each.phase.name, each.terms, int(suspect))

    def _end_epoch(self, epoch: int) -> bool:
        """Validate, save; True when early stopping says enough."""
        phases = self.plan.ending(epoch)
        values = self._judge(phases)
        self.progress.epoch = epoch
        self.progress.history.append({"step": self.progress.step, **values})
        if phases[-1] is self.plan.phases[-1]:  # early stopping watches the last phase: the others only prepare it
            self._note_the_best(values)
        self.listener.epoch_ended(epoch, self.progress.step, values)
        self.save(self.checkpoint())
        return self._patience_is_over()

    def _judge(self, phases: Sequence[Phase]) -> dict[str, float]:
        with self.stepper.shards.gathered() if self.stepper.shards else nullcontext():
            judged = self.validate(part_of(self.result, phases[0]), objective_of(phases))
        return {f"val/{phases[0].prefix}{name}": value for name, value in judged.items()}

    def _watched(self, values: dict[str, float]) -> float:
        """The value that early stopping watches; lower is better. Raises RecipeError where it is not measured."""
        metric = self.training.early_stopping.metric
        if metric not in values:
            raise RecipeError(
                f"early_stopping.metric = {metric}: this stage measures {listing(values, 'and')}." + did_you_mean(metric, values)
            )
        return -values[metric] if metric.endswith("accuracy") else values[metric]

    def _note_the_best(self, values: dict[str, float]) -> None:
        if self.training.early_stopping is None:
            return
        value, best = self._watched(values), self.progress.best
        if best is None or math.isnan(best) or value < best:  # nothing is less than NaN
            self.progress.best, self.progress.best_epoch = value, self.progress.epoch
            self._best_weights = {name: weight.detach().clone() for name, weight in self.result.state_dict().items()}

    def _patience_is_over(self) -> bool:
        early = self.training.early_stopping
        watched = self.progress.best_epoch > 0
        return early is not None and watched and self.progress.epoch - self.progress.best_epoch >= early.patience

    def checkpoint(self) -> Checkpoint:
        average = self.stepper.average
        state: dict[str, Any] = {
            "optimizers": [run.optimizer.state_dict() for run in self.runs],
            "schedules": [run.schedule.state_dict() for run in self.runs],
            "sums": [{"shares": run.shares, "steps": run.steps} for run in self.runs],
            "watches": [run.watch.state() for run in self.runs],
            "average": average.state_dict() if average else {},
            "best": self._best_weights,
        }
        weights, state = distributed.gather((self.model.state_dict(), state))
        return Checkpoint(weights, state, dict(vars(self.progress)))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same plan and model, of any number of ranks."""
        distributed.load_weights(self.model, checkpoint.weights)
        state = checkpoint.state
        for run, optimizer, schedule, sums, watch in zip(
            self.runs, state["optimizers"], state["schedules"], state["sums"], state["watches"], strict=True
        ):
            go_on(run.optimizer, optimizer)
            run.schedule.load_state_dict(schedule)
            run.shares.copy_(sums["shares"])
            run.steps.copy_(sums["steps"])
            run.watch.load(watch)
        if self.stepper.average is not None:
            self.stepper.average.load_state_dict(state["average"])
        own = self.result.state_dict()
        self._best_weights = {name: distributed.cut(weight, own[name]) for name, weight in state["best"].items()}
        self.progress = Progress(**checkpoint.progress)
        for entry in self.progress.history:  # JSON has no NaN
            entry |= {name: math.nan for name, value in entry.items() if value is None}
        self.stepper.step_on_device.fill_(self.progress.step)


def objective_of(phases: Sequence[Phase]) -> Objective:
    """Everything that some phases minimise, each term once: what validation measures."""
    total, seen = Objective(), set()
    for phase in phases:
        fresh = tuple(term for term in phase.objective.terms if term.name not in seen)
        seen |= {term.name for term in fresh}
        total = total + Objective(fresh)
    return total
