"""pretrain: the autoencoder on every row, labels unused."""

from __future__ import annotations

import numpy as np
import torch

from ssl_ae import distributed, runs
from ssl_ae.checkpoint import write_weights
from ssl_ae.model import Model, frozen
from ssl_ae.plan import pretraining
from ssl_ae.runs import StageFolder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.training_run import curves, final_metrics, train
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress

SHOWN = 10  # samples in the picture of reconstructions


def pretrain(ws: Workspace, restart: bool = False) -> Outcome:
    """Train encoder and decoder by l_X + penalties; RUN/pretrain holds weights, metrics and figures."""
    stage = ws.pretrained
    fields = ws.pretrain_fields()
    if stage.state(fields, restart) == "done":
        ws.reporter.say(f"pretrain: already done in {stage.path}")
        return ws.outcome("pretrain", stage, "skipped")
    feed, val = ws.feed("train"), ws.feed("val")
    model = ws.fresh_model(head=False)
    plan = pretraining(ws.resolved, model, feed.split.rows)
    state = ws.claim(stage, fields, restart)  # only now: damaged data must not leave a stage behind
    ws.reporter.say(
        f"pretrain: {feed.split.rows:,} rows, {plan.steps:,} steps of {plan.batch}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {ws.device}, "
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
    """Learning curves, and samples beside their reconstructions."""
    from ssl_ae import figures

    folder = stage.path / "figures"
    if progress.history:
        tracker.artifact(figures.learning_curves(folder / "learning_curves.png", curves(progress)), "figures")
    split = ws.data.split("val" if ws.data.split("val").rows else "train")
    stored = split.read(np.arange(min(SHOWN, split.rows)))
    x = ws.scaling(torch.from_numpy(stored).to(ws.device))
    with frozen(model), torch.no_grad():
        rebuilt = ws.scaling.inverse(model.decode(model.features(x)).mean).cpu().numpy()
    tracker.artifact(figures.reconstructions(folder / "reconstructions.png", stored, rebuilt, ws.card.x.kind), "figures")
