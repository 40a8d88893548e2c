"""A convex head in sequential mode at its minimum: the solver inside a stage, with its metrics, its progress and its warnings."""

from __future__ import annotations

import numpy as np
import torch

from ssl_ae import distributed
from ssl_ae.data.loading import Feed
from ssl_ae.errors import Stopped
from ssl_ae.model import Model
from ssl_ae.objective import SUPERVISED
from ssl_ae.solving import Minimum, solve
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.workspace import Workspace
from ssl_ae.stopping import stop_signals
from ssl_ae.trace import Batch
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress
from ssl_ae.validation import validate


def solve_head(ws: Workspace, codes: Model, z: np.ndarray, labels: Labels, val: Feed, tracker: Tracker, name: str) -> Progress:
    """Minimise l_Y over the head of `codes` on the stored latents z (N, K); a step of the progress is a pass over the labels.

    Every rank solves the whole: the latents are in each one's memory, and a pass takes no longer than agreeing on it would.
    Nothing is saved on the way. Raises Stopped: the same command starts over.
    """
    options, progress = ws.recipe.finetune.solver, Progress()
    batch = labelled(z, labels, ws.device)
    codes = codes.to(ws.device)
    with stop_signals() as asked_to_stop, ws.reporter.bar(name, options.max_passes, "passes") as advance:

        def told(passes: int, supervision: float, gradient: float) -> None:
            values = {"train/supervised": supervision, "train/gradient": gradient}
            _note(progress, tracker, passes, values)
            advance(1, f"supervised {supervision:.4g}  gradient {gradient:.2g}")
            if asked_to_stop.is_set():
                raise Stopped(f"stopped after pass {passes} over the labels. Run the same command to start the head over.")

        minimum = solve(codes.head, batch, options, ws.recipe.finetune.optimizer.weight_decay, told)
    progress.step = minimum.passes
    judged = validate(codes, SUPERVISED, val) if val.split.rows else {}
    values = {f"val/{term}": value for term, value in judged.items()}
    _note(progress, tracker, minimum.passes, values)
    shown = "  ".join(f"{term} {value:.4g}" for term, value in values.items())
    ws.reporter.say(
        f"{name}: objective {minimum.value:.6g}, gradient {minimum.gradient:.2g} after {minimum.passes} passes  {shown}".rstrip()
    )
    warn(ws, minimum)
    return progress


def labelled(z: np.ndarray, labels: Labels, device: torch.device) -> Batch:
    """The labelled rows as one batch."""
    rows = np.flatnonzero(labels.known)
    weight = None if labels.weight is None else torch.from_numpy(labels.weight[rows])
    fields = {"x": torch.from_numpy(z[rows]), "y": torch.from_numpy(labels.y[rows]), "weight_y": weight}
    return Batch(**{name: None if value is None else value.to(device) for name, value in fields.items()})


def warn(ws: Workspace, minimum: Minimum) -> None:
    """Where the head is not at a minimum, the user is told why."""
    if not minimum.attained:
        ws.reporter.warn(
            "a linear head separates the labels without an error, so l_Y has no minimum: the head is where "
            "finetune.solver.tolerance stopped it. Set finetune.optimizer.weight_decay, for example 1e-3."
        )
    elif not minimum.converged:
        ws.reporter.warn(
            f"the solver stopped at a gradient of {minimum.gradient:.2g}, above finetune.solver.tolerance = "
            f"{ws.recipe.finetune.solver.tolerance:g} ({minimum.reason}). Raise finetune.solver.max_passes or the tolerance."
        )


def _note(progress: Progress, tracker: Tracker, step: int, values: dict[str, float]) -> None:
    progress.history.append({"step": step, **values})
    if distributed.is_main():
        tracker.metrics(values, step)
