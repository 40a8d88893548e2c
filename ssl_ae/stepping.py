"""One optimizer step, for every technique: what ranks average, compilers see and a GPU replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssl_ae import distributed
from ssl_ae.model import Model, Slice
from ssl_ae.objective import Objective, StepMeans, count_rows
from ssl_ae.optimizing import Watch, build_optimizer, build_schedule
from ssl_ae.plan import Phase
from ssl_ae.randomness import seed_draws, seed_of
from ssl_ae.recipe import Training
from ssl_ae.replay import Refused, Replay
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
    replay: Replay | None = None  # of what a step launches on a GPU

    @property
    def terms(self) -> list[str]:
        return [term.name for term in (*self.phase.objective.of_data.terms, *self.phase.objective.of_parameters.terms)]


class Stepper:
    """Makes the optimizer steps of a model's phases. Randomness of a step comes from (seed, step, rank) alone.

    Everything that a step leaves for the next is written in place on the device, and the host never waits for it.
    """

    def __init__(
        self,
        model: Model,
        training: Training,
        *,
        seed: int,
        device: torch.device,
        bf16: bool = False,
        compile_step: bool = False,
        replay: bool = False,
        shards: bool = False,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`shards`: several ranks store a share of the model each. `replay`: record the launches of a step on a GPU, where one
        rank makes it in one part. `warn` hears when that fails.
        """
        self.model, self.training = model, training
        self.seed, self.device, self.bf16, self.compile_step = seed, device, bf16, compile_step
        self.replays = replay and device.type == "cuda" and distributed.world() == 1 and training.micro_batches == 1
        self.warn = warn
        self.shards = distributed.Shards(model) if shards and distributed.world() > 1 else None
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema)) if training.ema else None
        self.step_on_device = torch.zeros((), dtype=torch.int64, device=device)
        self.generator = torch.Generator(device)
        self._entered: PhaseRun | None = None
        self._phases = 0

    def prepare(self, phase: Phase, steps: int) -> PhaseRun:
        """What a phase of so many steps needs."""
        self._phases += 1
        model = part_of(self.model, phase)
        parameters = self._select(phase, model)
        optimizer = build_optimizer(self.training.optimizer, parameters)
        teacher = part_of(self.average.module, phase) if self.average else None
        step: nn.Module = Step(model, phase.objective.of_data, teacher)
        if self.compile_step:
            step.compile()
        terms = len(phase.objective.terms)
        run = PhaseRun(
            phase=phase,
            model=model,
            parameters=parameters,
            optimizer=optimizer,
            schedule=build_schedule(self.training.schedule, optimizer, steps),
            step=distributed.parallel(step, self.shards),
            shares=torch.zeros(terms, device=self.device),
            steps=torch.zeros((), device=self.device),
            watch=Watch(self.training.max_nonfinite_steps, self.device),
        )
        if self.replays:
            run.replay = Replay(lambda batch: self._launch(run, [batch]), self.generator)
        return run

    def make(self, run: PhaseRun, batches: Sequence[Batch], step: int) -> None:
        """Step number `step` of the training, over micro-batches."""
        self._enter(run)
        seed = seed_of(self.seed, step, distributed.rank())
        self._seed(seed)
        if run.replay is None:
            self._launch(run, batches, seed)
        else:
            self._replay(run, batches, seed)
        run.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _replay(self, run: PhaseRun, batches: Sequence[Batch], seed: int) -> None:
        try:
            run.replay(*batches)
        except Refused as reason:
            run.replay = None
            self.warn(
                f"phase {run.phase.name!r} is launched step by step, because it cannot be recorded as a CUDA graph: {reason}"
            )
            self._seed(seed)
            self._launch(run, batches, seed)

    def _seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        seed_draws(seed, self.device)

    def _launch(self, run: PhaseRun, batches: Sequence[Batch], seed: int = 0) -> None:
        """All that a step does on the device. Generators are seeded already; `seed` is for parts beyond the first."""
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
        parts, own = [], run.phase.objective.of_parameters
        for i, batch in enumerate(batches):
            if i:
                seed_draws(seed + i, self.device)
            last = i + 1 == len(batches)
            with distributed.without_sync(run.step, skip=not last):
                with self._autocast():
                    part = run.step(batch, rows, means, self.step_on_device)
                loss = objective.weigh(part, self.step_on_device)
                if self.shards is None:
                    loss = loss * distributed.world()  # ranks average their gradients, but shares are to be summed
                elif last and own.terms:
                    of_parameters, shares = self._parameter_terms(run)  # now, while the weights are whole
                    loss = loss + of_parameters / distributed.world()
                loss.backward()
            parts.append(part.detach())
        if self.shards is None and own.terms:
            of_parameters, shares = self._parameter_terms(run)
            of_parameters.backward()  # the same on every rank, so added once, after the reduction
        total = sum(parts[1:], parts[0])
        self._update(run, torch.cat([total, shares]) if own.terms else total)
        self.step_on_device += 1

    def _parameter_terms(self, run: PhaseRun) -> tuple[Tensor, Tensor]:
        """Loss () and shares (terms,) of parameters alone."""
        objective = run.phase.objective.of_parameters
        shares = objective.shares(Trace(model=run.model), {Over.MODEL: torch.ones((), device=self.device)})
        return objective.weigh(shares, self.step_on_device), shares.detach() / distributed.world()  # readings sum over ranks

    def _update(self, run: PhaseRun, shares: Tensor) -> None:
        norm = distributed.total_norm([p.grad for p in run.parameters if p.grad is not None])
        found = ~torch.isfinite(norm)
        if self.training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(run.parameters, self.training.clip_norm, norm)
        run.optimizer.found_inf = found.float()  # the fused kernels skip the update without asking the host
        run.optimizer.step()
        with torch.no_grad():
            for regularizer in self.model.regularizers:
                if "project" in regularizer.verbs:
                    regularizer.project(self.model)
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
        seed_draws(seed, self.device)
        means.finish_collecting()

    def _transformed(self, batch: Batch) -> Batch:
        for regularizer in self.model.regularizers:
            if "transform" in regularizer.verbs:
                batch = regularizer.transform(batch, self.generator)
        return batch

    def _select(self, phase: Phase, part: Model) -> list[nn.Parameter]:
        """Let the phase's parameters have gradients and no others."""
        chosen, own = [], {id(parameter) for parameter in part.parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(id(parameter) in own and matches(name, phase.trainable))
            if parameter.requires_grad:
                chosen.append(parameter)
        return chosen

    def _enter(self, run: PhaseRun) -> None:
        if self._entered is not run and self._phases > 1:
            self._select(run.phase, run.model)
        self._entered = run
        if not self.model.training:
            self.model.train()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()


def part_of(model: Model, phase: Phase) -> Model:
    """What a phase trains: the whole model, or one slice of it."""
    return model if phase.slice is None else Slice(model, phase.slice)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Every count-th row: labelled and uniform rows spread evenly over the parts."""
    if count == 1:
        return [batch]
    fields = vars(batch)
    parts = [Batch(**{name: None if value is None else value[i::count] for name, value in fields.items()}) for i in range(count)]
    return [part for part in parts if len(part)] or [batch]  # a rank without rows still takes part in the reduction
