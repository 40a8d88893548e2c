"""The loop. One `step` trains every technique: it asks the plan what to minimise and the feed what to minimise it on."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssl_ae import distributed
from ssl_ae.checkpoint import Checkpoint
from ssl_ae.data.loading import Feed
from ssl_ae.errors import RecipeError, Stopped, did_you_mean, listing
from ssl_ae.model import Model, Slice
from ssl_ae.objective import Objective, StepMeans, count_rows
from ssl_ae.optimizing import Watch, build_optimizer, build_schedule
from ssl_ae.plan import Phase, Plan
from ssl_ae.randomness import seed_draws, seed_of
from ssl_ae.recipe import Training
from ssl_ae.trace import Batch, Need, Over, Trace, matches


class Step(nn.Module):
    """Everything of a step that reads data, in one forward: the unit that ranks average and compilers see."""

    def __init__(self, model: Model, objective: Objective, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self._teacher = [teacher]  # in a list, so that its weights are no parameters of the step

    def forward(self, batch: Batch, rows: Mapping[Over, Tensor], means: StepMeans | None, step: Tensor) -> Tensor:
        """(terms,) unweighted shares of this micro-batch."""
        trace = self.model(batch, self.objective.needs, means, self._teacher[0], step)
        if means is None:
            return self.objective.shares(trace, rows)
        means.begin()
        return (self.objective.of_step_means if means.collecting else self.objective).shares(trace, rows)


@dataclass
class PhaseRun:
    """A phase with what it needs to make steps."""

    phase: Phase
    model: Model  # the part of the model that trains
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LambdaLR
    step: nn.Module
    shares: Tensor  # (terms,) summed since the last reading, on the device
    steps: Tensor  # () steps in `shares`: those that were not skipped
    watch: Watch

    @property
    def terms(self) -> list[str]:
        return [term.name for term in (*self.phase.objective.of_data.terms, *self.phase.objective.of_parameters.terms)]


@dataclass
class Progress:
    """What a run has reached; JSON in every checkpoint."""

    step: int = 0
    epoch: int = 0
    best: float | None = None  # of the metric that early stopping watches
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # one entry a reading: step, metrics by name


class Listener:
    """Who is told about progress. The defaults say nothing."""

    def stepped(self, step: int, rows: int) -> None: ...

    def measured(self, step: int, values: dict[str, float]) -> None: ...

    def epoch_ended(self, epoch: int, step: int, values: dict[str, float]) -> None: ...


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
        validate: Callable[[Model, Objective], dict[str, float]] = lambda model, objective: {},
        save: Callable[[Checkpoint], None] = lambda checkpoint: None,
        listener: Listener | None = None,
    ) -> None:
        self.model, self.plan, self.feed, self.training = model.to(device), plan, feed, training
        self.seed, self.device, self.bf16 = seed, device, bf16
        self.validate, self.save, self.listener = validate, save, listener or Listener()
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema)) if training.ema else None
        self.progress = Progress()
        self._best_weights: dict[str, Tensor] = {}  # of the best epoch, where early stopping watches one
        self.step_on_device = torch.zeros((), dtype=torch.int64, device=device)
        self.generator = torch.Generator(device)
        self.runs = [self._prepare(phase, compile_step) for phase in plan.phases]
        self._entered: PhaseRun | None = None

    @property
    def result(self) -> Model:
        """The model to keep: the average where the recipe asks for one."""
        return self.average.module if self.average else self.model

    def run(self) -> Progress:
        """Train to the plan's end, or to early stopping, which keeps the weights of the best epoch.

        Raises Stopped after saving, NonFiniteError.
        """
        if not self._patience_is_over():  # else it was killed after its last checkpoint
            self._run()
        if self._best_weights:
            self.result.load_state_dict(self._best_weights)
        return self.progress

    def _run(self) -> None:
        last = self.plan.steps
        requests = ((self.runs[phase].phase.draw, k) for phase, k in map(self.plan.at, range(self.progress.step, last)))
        ends = {self.plan.epoch_end(epoch): epoch for epoch in range(1, self.plan.epochs + 1)}
        started = time.monotonic() - self.progress.seconds
        with stop_signals() as asked_to_stop:
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
                # ranks must leave at one step; agreeing costs a wait, so several ranks do it when they wait anyway
                if (distributed.world() == 1 or reading) and distributed.any_rank(asked_to_stop.is_set(), self.device):
                    self.save(self.checkpoint())
                    raise Stopped(f"stopped after step {step + 1} of {last}; the place is saved. Run the same command to go on.")

    def make_step(self, run: PhaseRun, batches: Sequence[Batch]) -> None:
        """One optimizer step over micro-batches. The host never waits for the device here."""
        self._enter(run)
        seed = seed_of(self.seed, self.progress.step, distributed.rank())
        self.generator.manual_seed(seed)
        batches = [self._transformed(batch) for batch in batches]
        rows = count_rows(batches)  # the one place that decides the divisor
        objective = run.phase.objective.of_data
        # also where this rank's rows gave one part only: ranks must enter the same reductions in the same order
        several = len(batches) > 1 or self.training.micro_batches > 1
        means = StepMeans(rows, several) if Need.STEP_MEAN in objective.needs else None
        if means is not None and several:
            self._collect(run, batches, rows, means, seed)
        for parameter in run.parameters:
            parameter.grad = None
        parts = []
        for i, batch in enumerate(batches):
            seed_draws(seed + i, self.device)
            with distributed.without_sync(run.step, skip=i + 1 < len(batches)):
                with self._autocast():
                    part = run.step(batch, rows, means, self.step_on_device)
                # ranks average their gradients, but shares are to be summed
                (objective.weigh(part, self.step_on_device) * distributed.world()).backward()
            parts.append(part.detach())
        shares = sum(parts[1:], parts[0])
        if run.phase.objective.of_parameters.terms:
            shares = torch.cat([shares, self._parameter_terms(run)])
        self._update(run, shares)
        self.step_on_device += 1

    def _parameter_terms(self, run: PhaseRun) -> Tensor:
        """Terms of parameters alone: the same on every rank, so added once, after the reduction."""
        objective = run.phase.objective.of_parameters
        shares = objective.shares(Trace(model=run.model), {Over.MODEL: torch.ones((), device=self.device)})
        objective.weigh(shares, self.step_on_device).backward()
        return shares.detach() / distributed.world()  # readings sum over ranks

    def _update(self, run: PhaseRun, shares: Tensor) -> None:
        gradients = [p.grad for p in run.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        found = ~torch.isfinite(norm)
        if self.training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(run.parameters, self.training.clip_norm, norm)
        run.optimizer.found_inf = found.float()  # the fused kernels skip the update without asking the host
        run.optimizer.step()
        run.schedule.step()
        with torch.no_grad():
            for regularizer in self.model.regularizers:
                if "project" in regularizer.verbs:
                    regularizer.project(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
        run.watch.see(found, shares, self.step_on_device)
        run.shares += torch.where(found, 0.0, shares)
        run.steps += ~found

    def _collect(self, run: PhaseRun, batches: Sequence[Batch], rows: Mapping[Over, Tensor], means: StepMeans, seed: int) -> None:
        """A first pass that only sums what the terms take means of, with the noise that the second will have."""
        means.collecting = True
        needs = run.phase.objective.of_step_means.needs
        with torch.set_grad_enabled(Need.INPUT_GRAD in needs), self._autocast():
            for i, batch in enumerate(batches):
                seed_draws(seed + i, self.device)  # each part afresh: this pass may draw less than the second
                distributed.on_this_rank(run.step)(batch, rows, means, self.step_on_device)
        means.finish_collecting()

    def _transformed(self, batch: Batch) -> Batch:
        for regularizer in self.model.regularizers:
            if "transform" in regularizer.verbs:
                batch = regularizer.transform(batch, self.generator)
        return batch

    def _prepare(self, phase: Phase, compile_step: bool) -> PhaseRun:
        model = part_of(self.model, phase)
        parameters = self._select(phase, model)
        optimizer = build_optimizer(self.training.optimizer, parameters)
        teacher = part_of(self.average.module, phase) if self.average else None
        step: nn.Module = Step(model, phase.objective.of_data, teacher)
        if compile_step:
            step.compile()
        terms = len(phase.objective.terms)
        return PhaseRun(
            phase=phase,
            model=model,
            parameters=parameters,
            optimizer=optimizer,
            schedule=build_schedule(self.training.schedule, optimizer, self.plan.steps_of(phase)),
            step=distributed.parallel(step),
            shares=torch.zeros(terms, device=self.device),
            steps=torch.zeros((), device=self.device),
            watch=Watch(self.training.max_nonfinite_steps, self.device),
        )

    def _select(self, phase: Phase, part: Model) -> list[nn.Parameter]:
        """Let the phase's parameters have gradients and no others."""
        chosen, own = [], {id(parameter) for parameter in part.parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(id(parameter) in own and matches(name, phase.trainable))
            if parameter.requires_grad:
                chosen.append(parameter)
        return chosen

    def _enter(self, run: PhaseRun) -> None:
        if self._entered is not run and len(self.runs) > 1:
            self._select(run.phase, run.model)
        self._entered = run
        if not self.model.training:
            self.model.train()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

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
                values["train/lr"] = each.optimizer.param_groups[0]["lr"]
            if values:
                self.progress.history.append({"step": self.progress.step, **values})
                self.listener.measured(self.progress.step, values)
            each.shares.zero_()
            each.steps.zero_()
        for each in self.runs:
            suspect = distributed.max_over_ranks(each.watch.suspect.clone())
            each.watch.check(each.phase.name, each.terms, int(suspect))

    def _end_epoch(self, epoch: int) -> bool:
        """Validate, save; True when early stopping says enough."""
        phases = self.plan.ending(epoch)
        judged = self.validate(part_of(self.result, phases[0]), objective_of(phases))
        values = {f"val/{phases[0].prefix}{name}": value for name, value in judged.items()}
        self.progress.epoch = epoch
        self.progress.history.append({"step": self.progress.step, **values})
        if phases[-1] is self.plan.phases[-1]:  # early stopping watches the last phase: the others only prepare it
            self._note_the_best(values)
        self.listener.epoch_ended(epoch, self.progress.step, values)
        self.save(self.checkpoint())
        return self._patience_is_over()

    def _note_the_best(self, values: dict[str, float]) -> None:
        early = self.training.early_stopping
        if early is None:
            return
        value = values.get(early.metric)
        if value is None:
            raise RecipeError(
                f"early_stopping.metric = {early.metric}: this stage measures {listing(values, 'and')}."
                + did_you_mean(early.metric, values)
            )
        value = -value if early.metric.endswith("accuracy") else value
        best = self.progress.best
        if best is None or math.isnan(best) or value < best:  # nothing is less than NaN
            self.progress.best, self.progress.best_epoch = value, self.progress.epoch
            self._best_weights = {name: weight.detach().clone() for name, weight in self.result.state_dict().items()}

    def _patience_is_over(self) -> bool:
        early = self.training.early_stopping
        watched = self.progress.best_epoch > 0
        return early is not None and watched and self.progress.epoch - self.progress.best_epoch >= early.patience

    def checkpoint(self) -> Checkpoint:
        state: dict[str, Any] = {
            "optimizers": [run.optimizer.state_dict() for run in self.runs],
            "schedules": [run.schedule.state_dict() for run in self.runs],
            "sums": [{"shares": run.shares, "steps": run.steps} for run in self.runs],
            "watches": [run.watch.state() for run in self.runs],
            "average": self.average.state_dict() if self.average else {},
            "best": self._best_weights,
        }
        return Checkpoint(self.model.state_dict(), state, dict(vars(self.progress)))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same plan and model."""
        self.model.load_state_dict(checkpoint.weights)
        state = checkpoint.state
        for run, optimizer, schedule, sums, watch in zip(
            self.runs, state["optimizers"], state["schedules"], state["sums"], state["watches"], strict=True
        ):
            run.optimizer.load_state_dict(optimizer)
            run.schedule.load_state_dict(schedule)
            run.shares.copy_(sums["shares"])
            run.steps.copy_(sums["steps"])
            run.watch.load(watch)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._best_weights = state["best"]
        self.progress = Progress(**checkpoint.progress)
        for entry in self.progress.history:  # JSON has no NaN
            entry |= {name: math.nan for name, value in entry.items() if value is None}
        self.step_on_device.fill_(self.progress.step)


def part_of(model: Model, phase: Phase) -> Model:
    """What a phase trains: the whole model, or one slice of it."""
    return model if phase.slice is None else Slice(model, phase.slice)


def objective_of(phases: Sequence[Phase]) -> Objective:
    """Everything that some phases minimise, each term once: what validation measures."""
    total, seen = Objective(), set()
    for phase in phases:
        fresh = tuple(term for term in phase.objective.terms if term.name not in seen)
        seen |= {term.name for term in fresh}
        total = total + Objective(fresh)
    return total


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Every count-th row: labelled and uniform rows spread evenly over the parts."""
    if count == 1:
        return [batch]
    fields = vars(batch)
    parts = [Batch(**{name: None if value is None else value[i::count] for name, value in fields.items()}) for i in range(count)]
    return [part for part in parts if len(part)] or [batch]  # a rank without rows still takes part in the reduction


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGTERM or SIGINT, so that training can save and leave; a second SIGINT aborts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
