"""Training inside a stage: checkpoints, progress, tracking and learning curves around the one loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ssl_ae import distributed
from ssl_ae.checkpoint import Checkpoint, Saver, load_checkpoint
from ssl_ae.data.loading import Feed
from ssl_ae.errors import Stopped
from ssl_ae.model import Model
from ssl_ae.plan import Plan
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Training
from ssl_ae.runs import StageFolder
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Listener, Progress, Trainer
from ssl_ae.validation import validate

CHECKPOINT = "checkpoint"  # the folder in a stage's own
BAR_EVERY_SECONDS = 0.2  # drawing must cost nothing beside a step
LINE_EVERY_SECONDS = 5.0  # epochs may be short
EMULATED = (
    "precision: bf16: torch does not say that this device computes in it itself; where it is emulated, a step takes two to four "
    "times as long as in fp32. Take precision: auto, or fp32."
)


def train(
    ws: Workspace,
    model: Model,
    plan: Plan,
    feed: Feed,
    training: Training,
    *,
    name: str,
    stage: StageFolder | None = None,
    tracker: Tracker | None = None,
    val: Feed | None = None,
    resume: bool = False,
) -> tuple[Model, Progress]:
    """Train by the plan and return the model to keep. With `stage`, saved each epoch and when asked to stop."""
    listener = Teller(ws.reporter, tracker, plan, name)
    bf16 = ws.recipe.precision == "bf16"
    if bf16 and not distributed.computes_bf16(ws.device) and EMULATED not in ws.reporter.warnings:
        ws.reporter.warn(EMULATED)
    trainer = Trainer(
        model,
        plan,
        feed,
        training,
        seed=ws.recipe.seed,
        device=ws.device,
        bf16=bf16,
        compile_step=ws.recipe.compile is True,
        replay=ws.recipe.compile == "auto",
        shards=ws.recipe.parallel == "fsdp",
        validate=(lambda m, objective: validate(m, objective, val)) if val is not None and val.split.rows else (lambda *_: {}),
        listener=listener,
    )
    found = load_checkpoint(stage.path / CHECKPOINT, ws.reporter.warnings) if resume and stage else None
    if found:
        trainer.restore(found)
        ws.reporter.say(f"resuming {name} at step {trainer.progress.step} of {plan.steps}")
    else:
        trainer.check_early_stopping()
    with contextlib.ExitStack() as stack:
        if stage:
            saver = Saver(stage.path / CHECKPOINT, resumed=trainer.progress.step if found else None)
            trainer.save = stack.enter_context(_saving(saver, ws.reporter))
        stack.enter_context(listener.watching(trainer.progress.step))
        progress = trainer.run()
    return trainer.kept(), progress


def final_metrics(progress: Progress) -> dict[str, float]:
    """The last value of everything that was measured; where early stopping kept the best epoch, the validation of that one."""
    last: dict[str, float] = dict(progress.found)
    for entry in progress.history:
        last |= {name: value for name, value in entry.items() if name not in ("step", "train/lr")}
    validated = [entry for entry in progress.history if any(name.startswith("val/") for name in entry)]
    if progress.best_epoch:
        last |= {name: value for name, value in validated[progress.best_epoch - 1].items() if name != "step"}
    return last


def curves(progress: Progress) -> dict[str, tuple[list[float], list[float]]]:
    """{metric: (steps, values)} for the figure."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for entry in progress.history:
        for name, value in entry.items():
            if name != "step":
                steps, values = series.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return series


class Teller(Listener):
    """Tells the reporter and the tracker. Neither makes a step wait."""

    def __init__(self, reporter: Reporter, tracker: Tracker | None, plan: Plan, name: str) -> None:
        self.reporter, self.tracker, self.plan, self.name = reporter, tracker, plan, name
        self._latest: dict[str, float] = {}
        self._untold, self._told_at, self._said_at = 0, time.monotonic(), 0.0
        self._rows_per_step = sum(p.draw.uniform + p.draw.labeled for p in plan.phases) / len(plan.phases)

    @contextlib.contextmanager
    def watching(self, start: int) -> Iterator[None]:
        """Show a bar over the rows of the steps from `start` on."""
        with self.reporter.bar(self.name, round((self.plan.steps - start) * self._rows_per_step)) as self._advance:
            yield

    def stepped(self, step: int, rows: int) -> None:
        self._untold += rows
        now = time.monotonic()
        if now - self._told_at >= BAR_EVERY_SECONDS:
            self._advance(self._untold, _shown(self._latest))
            self._untold, self._told_at = 0, now

    def warned(self, message: str) -> None:
        self.reporter.warn(message)

    def measured(self, step: int, values: dict[str, float]) -> None:
        self._latest = values
        if self.tracker is not None and distributed.is_main():
            self.tracker.metrics(values, step)

    def epoch_ended(self, epoch: int, step: int, values: dict[str, float]) -> None:
        if self.tracker is not None and distributed.is_main():
            self.tracker.metrics({**values, "epoch": epoch}, step)
        now = time.monotonic()
        if values and (now - self._said_at >= LINE_EVERY_SECONDS or step == self.plan.steps):
            self._said_at = now
            self.reporter.say(f"{self.name}: epoch {epoch}/{self.plan.epochs}  {_shown(values)}")


@contextlib.contextmanager
def _saving(saver: Saver, reporter: Reporter) -> Iterator[Callable[[Checkpoint], None]]:
    """Yield what saves from rank 0 without making training wait. At the end of the block the last save is on the disk.

    A save that failed is raised on every rank by the next one or at the end, in place of Stopped too, and told where
    training ends by another error.
    """

    def save(checkpoint: Checkpoint) -> None:
        with distributed.main_first() as main:
            if main:
                saver.save(checkpoint)

    with saver:
        try:
            yield save
        except Stopped:
            saver.wait()
            raise
        except BaseException:
            try:
                saver.wait()
            except Exception as lost:
                reporter.warn(f"the last checkpoint was not saved: {lost}")
            raise
        with distributed.main_first() as main:
            if main:
                saver.wait()


def _shown(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "train/lr")
