"""pretrain: the autoencoder on every row, labels unused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_ae import distributed, runs
from ssl_ae.checkpoint import write_weights
from ssl_ae.model import Model, frozen
from ssl_ae.plan import pretraining
from ssl_ae.randomness import seed_draws, seed_of
from ssl_ae.runs import Inputs, StageFolder
from ssl_ae.stages.changed import allowed, software
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.training_run import curves, final_metrics, train
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import Batch, Need, Trace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress

SHOWN = 10  # samples in the picture of reconstructions
TRACED = 256  # rows that components make pictures of
PICTURES = 7  # the stream of random numbers that pictures draw from


def pretrain(ws: Workspace, restart: bool = False, force: bool = False) -> Outcome:
    """Train encoder and decoder by l_X + penalties; RUN/pretrain holds weights, metrics and figures.

    `force` goes on although something changed that the weights do not depend on (`changed`).
    """
    stage = ws.pretrained
    allow = allowed("pretrain", ws.recipe.pretrain, lambda: bool(ws.fresh_model(head=False).encoder.slices()))
    inputs = Inputs(ws.pretrain_fields(), software(ws.resolved, head=False), allow if force else None)
    if stage.state(inputs, restart) == "done":
        ws.reporter.say(f"pretrain: already done in {stage.path}")
        return ws.outcome("pretrain", stage, "skipped")
    feed, val = ws.feed("train"), ws.feed("val")
    model = ws.fresh_model(head=False)
    plan = pretraining(ws.resolved, model, feed.split.rows)
    state = ws.claim(stage, inputs, restart)  # only now: damaged data must not leave a stage behind
    ws.reporter.say(
        f"pretrain: {feed.split.rows:,} rows, {plan.steps:,} steps of {plan.batch}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {ws.device}, {ws.recipe.precision}, "
        f"data {'resident' if feed.resident else 'streamed'}"
    )
    with ws.tracker(stage, "pretrain") as tracker:
        kept, progress = train(
            ws,
            model,
            plan,
            feed,
            ws.recipe.pretrain,
            name="pretrain",
            stage=stage,
            tracker=tracker,
            val=val,
            resume=state == "resume",
        )
        with distributed.main_first() as main:
            if main:
                write_weights(stage.path / runs.MODEL, kept.state_dict(), stage.fingerprint)
                draw_figures(ws, kept, progress, stage, tracker)
                tracker.artifact(stage.path / runs.MODEL, "checkpoint")
                stage.finish(final_metrics(progress))
    return ws.outcome("pretrain", stage)


def draw_figures(ws: Workspace, model: Model, progress: Progress, stage: StageFolder, tracker: Tracker) -> None:
    """Learning curves, samples beside their reconstructions, and what the components show of themselves."""
    from ssl_ae import figures

    folder, drawn = stage.path / "figures", []
    if progress.history:
        drawn.append(figures.learning_curves(folder / "learning_curves.png", curves(progress)))
    split = ws.data.split("val" if ws.data.split("val").rows else "train")
    stored = split.read(spread(TRACED, split.rows))
    x = ws.scaling(torch.from_numpy(stored).to(ws.device))
    with frozen(model), torch.no_grad():
        seed_draws(seed_of(ws.recipe.seed, PICTURES), ws.device)
        shown = spread(SHOWN, len(stored))
        drawn.append(draw_reconstructions(ws, model, stored[shown], x[shown], folder))
        trace = model(Batch(x=x), frozenset({Need.RECONSTRUCTION, Need.CLEAN}))
        drawn += draw_components(ws, model, trace, folder)
    for path in drawn:
        tracker.artifact(path, "figures")


def spread(count: int, rows: int) -> np.ndarray:
    """So many row numbers at most, evenly spaced: neighbours in a split are often alike."""
    return np.linspace(0, rows - 1, min(count, rows)).round().astype(np.int64)


def draw_reconstructions(ws: Workspace, model: Model, stored: np.ndarray, x: Tensor, folder: Path) -> Path:
    """Samples, what the encoder sees of them in training where that differs, and what the model makes of that without noise."""
    from ssl_ae import figures

    seen, quiet = model.disturbed(x), model(Batch(x=x)).taps["input"]
    rebuilt = model.reconstruct(x if torch.equal(seen, quiet) else seen)  # what is always done to x is done there
    corrupted = None if torch.equal(seen, x) else ws.scaling.inverse(seen).cpu().numpy()
    low, high = ws.card.x.range
    return figures.reconstructions(
        folder / "reconstructions.png",
        stored,
        ws.scaling.inverse(rebuilt.mean).cpu().numpy(),
        ws.card.x.kind,
        corrupted,
        peak=high - low if ws.card.x.kind == "image" else None,
    )


def draw_components(ws: Workspace, model: Model, trace: Trace, folder: Path) -> list[Path]:
    """figures/NAME.png for each picture of each component; one that fails costs a warning, not the training."""
    from ssl_ae import figures

    drawn, taken = [], {"learning_curves", "reconstructions"}
    parts = (ws.resolved.encoder, ws.resolved.decoder, *ws.resolved.regularizers)
    for part, component in zip(parts, (model.encoder, model.decoder, *model.regularizers), strict=True):
        try:
            for picture in component.pictures(trace):
                name, count = picture.name, 2
                while name in taken:
                    name, count = f"{picture.name}-{count}", count + 1
                drawn.append(figures.draw(folder / f"{name}.png", picture))
                taken.add(name)
        except Exception as error:  # a component may raise anything, and the weights are worth more than a picture
            reason = f"{type(error).__name__}: {error}"
            ws.reporter.warn(f"{part.entry.kind} {part.full_name} shows no picture of itself, or not all: {reason}")
    return drawn
