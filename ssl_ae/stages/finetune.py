"""finetune: a head on few labels: on stored latents, or together with the autoencoder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ae import distributed, files, latents, runs
from ssl_ae.checkpoint import write_weights
from ssl_ae.data.loading import Feed, Table
from ssl_ae.errors import CheckpointError, RecipeError, listing
from ssl_ae.model import Model, on_codes
from ssl_ae.plan import finetuning, head_training
from ssl_ae.recipe import Finetune
from ssl_ae.resolve import Resolved
from ssl_ae.runs import STAGE, Inputs, StageFolder, diff
from ssl_ae.stages.baselines import fit_baselines, predict_baselines
from ssl_ae.stages.changed import allowed, software
from ssl_ae.stages.extract import extract
from ssl_ae.stages.fitted_head import fit_head
from ssl_ae.stages.labels import Labels, labels_of, with_guesses
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.report import draw_figures, log_model, tell_comparison
from ssl_ae.stages.scoring import predict_rows, score
from ssl_ae.stages.solved_head import solve_head
from ssl_ae.stages.training_run import final_metrics, train
from ssl_ae.stages.workspace import Workspace, only_writer
from ssl_ae.trace import Need
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress

CLASSES_SHOWN = 12
SPLITS = ("train", "val")  # whose latents a head needs: one to learn from, one to be judged on


def finetune(ws: Workspace, restart: bool = False, pretrained: Path | None = None, force: bool = False) -> Outcome:
    """Train the recipe's head in the recipe's mode; RUN/finetune/METHOD holds the whole model.

    `pretrained` is the run folder that weights and latents come from, this one unless given; also RUN/finetune/METHOD, for the
    encoder that a finetuning has left. `force` goes on although
    something changed that the weights do not depend on (`changed`).
    """
    training = ws.recipe.finetune
    check_mode(ws.resolved)
    labels = labels_of(ws) if training.mode == "sequential" else with_guesses(ws, labels_of(ws))
    origin = Workspace(ws.resolved, ws.data, pretrained or ws.run, ws.device, ws.reporter, published=ws.published)
    if uses_pretrained(training):
        check_origin(origin)
    fields = fields_of(ws, labels, origin if uses_pretrained(training) else None)
    allow = allowed("finetune", training) if force else None
    inputs = Inputs(fields, software(ws.resolved, head=True), allow)
    stage = choose_folder(ws.run, method_of(training), inputs)
    if stage.state(inputs, restart) == "done":
        ws.reporter.say(f"finetune: already done in {stage.path}")
        return ws.outcome("finetune", stage, "skipped", method=stage.path.name)
    feed, val = ws.feed("train", labels.y, labels.weight, labels.guess), ws.labeled_feed("val")
    if training.mode == "sequential":
        extract_missing(origin, ws)
    state = ws.claim(stage, inputs, restart)  # only now: damaged data must not leave a stage behind
    name = f"finetune {stage.path.name}"
    ws.reporter.say(f"{name}: {labels.count:,} labels of {len(labels.y):,} train rows")
    warn_of_unlabelled_classes(ws, labels)
    warn_of_idle_terms(ws)
    with ws.tracker(stage, f"finetune/{stage.path.name}") as tracker:
        if training.mode == "sequential":
            model, progress = train_head(origin, labels, stage, tracker, name, state == "resume")
        else:
            model, progress = train_network(ws, origin, labels, feed, val, stage, tracker, name, state == "resume")
        folder = fit_baselines(ws, labels, feed) if training.baselines else None
        with distributed.main_first() as main:
            if main:
                metrics = judge(ws, model, progress, stage, tracker, folder)
                write_weights(stage.path / runs.MODEL, model.state_dict(), stage.fingerprint)
                log_model(ws, stage, tracker)
                stage.finish(metrics)
    return ws.outcome("finetune", stage, method=stage.path.name)


def warn_of_unlabelled_classes(ws: Workspace, labels: Labels) -> None:
    """A class that no label shows is never learned, and nothing else would tell."""
    if ws.card.y.task != "classes":
        return
    counts = np.bincount(labels.y[labels.known], minlength=len(ws.card.y.names))
    absent = [repr(name) for name, count in zip(ws.card.y.names, counts, strict=True) if not count]
    if absent:
        shown = absent if len(absent) <= CLASSES_SHOWN else [*absent[:CLASSES_SHOWN], f"{len(absent) - CLASSES_SHOWN} more"]
        ws.reporter.warn(f"no train row has a label of class {listing(shown, 'and')}: such samples will be taken for others.")


def warn_of_idle_terms(ws: Workspace) -> None:
    """A head on frozen codes is trained by its labels alone: what other rows should make of it is left out."""
    of_predictions = {Need.PREDICTION, Need.TEACHER}
    idle = [part.cls.name for part in ws.resolved.regularizers if of_predictions & part.cls.needs]
    if ws.recipe.finetune.mode == "sequential" and idle:
        ws.reporter.warn(
            f"model.regularizers: sequential training leaves out what is of predictions: {listing(idle, 'and')}. Add --joint or "
            "--end-to-end."
        )


def extract_missing(origin: Workspace, ws: Workspace) -> None:
    """The latents that a head is trained and judged on, where the pretrained run does not have them yet."""
    with contextlib.ExitStack() as stack:
        if origin.holder.resolve() != ws.run.resolve():  # whose lock is held already
            stack.enter_context(only_writer(origin.holder, ws.reporter))
        extract(origin, SPLITS)


def train_head(
    origin: Workspace, labels: Labels, stage: StageFolder, tracker: Tracker, name: str, resume: bool
) -> tuple[Model, Progress]:
    """Sequential: l_Y over the head alone, on the stored latents of the frozen encoder."""
    tables = {split: origin.run / "latents" / split for split in SPLITS}
    z = {split: latents.read(table).z for split, table in tables.items()}
    for split, table in tables.items():
        digest = files.sha256_of(table / latents.MANIFEST)
        tracker.dataset(f"latents-{split}", digest, str(table.absolute()), split, len(z[split]))
    model = origin.load_pretrained(origin.fresh_model(head=True))
    if origin.resolved.head.cls.fitted_at_once:
        progress = fit_head(origin, model, z["train"], labels, tracker, name)
        return model, progress
    model.head.prepare(torch.as_tensor(labels.y[labels.known]))
    training = origin.recipe.finetune
    feed = codes_feed(origin, z["train"], labels.y, labels.weight)
    val = codes_feed(origin, z["val"], origin.labels("val"), None)
    codes = on_codes(model.head, origin.resolved.shapes)
    plan = head_training(training, len(labels.y), labels.count)
    ways = {
        "steps": lambda: train(
            origin, codes, plan, feed, training, name=name, stage=stage, tracker=tracker, val=val, resume=resume
        ),
        "lbfgs": lambda: (codes, solve_head(origin, codes, z["train"], labels, val, tracker, name)),
    }
    kept, progress = ways[training.solver.name]()
    model.head.load_state_dict(kept.head.state_dict())
    return model, progress


def codes_feed(ws: Workspace, z: np.ndarray, y: np.ndarray, weight: np.ndarray | None) -> Feed:
    """Stored latents as a split."""
    return Feed(
        Table(z),
        y,
        lambda stored: stored,
        seed=ws.recipe.seed,
        device=ws.device,
        residency="resident",
        weight_y=weight,
        rank=distributed.rank(),
        world=distributed.world(),
    )


def train_network(
    ws: Workspace,
    origin: Workspace,
    labels: Labels,
    feed: Feed,
    val: Feed,
    stage: StageFolder,
    tracker: Tracker,
    name: str,
    resume: bool,
) -> tuple[Model, Progress]:
    """Joint, alternating or end-to-end: the encoder trains too."""
    training = ws.recipe.finetune
    model = ws.fresh_model(head=True)
    if uses_pretrained(training):
        origin.load_pretrained(model)
    model.head.prepare(torch.as_tensor(labels.y[labels.known]))
    plan = finetuning(ws.resolved, model, training.mode, feed.split.rows, labels.count)
    return train(ws, model, plan, feed, training, name=name, stage=stage, tracker=tracker, val=val, resume=resume)


def judge(
    ws: Workspace, model: Model, progress: Progress, stage: StageFolder, tracker: Tracker, baselines: Path | None
) -> dict[str, float]:
    """Validation figures of the model and of its baselines, side by side; a warning where unlabelled data did not help."""
    metrics = final_metrics(progress)
    y = ws.labels("val")
    predictions = predict_rows(model, ws.labeled_feed("val")) if len(y) else None
    ours = score(predictions.values, y, ws.card.y) if predictions else {}
    metrics |= {f"val/{name}": value for name, value in ours.items()}
    theirs = {}
    if baselines is not None and ours:
        theirs = {name: score(values, y, ws.card.y) for name, values in predict_baselines(ws, baselines, "val").items()}
        metrics |= {f"val/{name}/{key}": value for name, found in theirs.items() for key, value in found.items()}
    tell_comparison(ws, "val", {stage.path.name: ours}, theirs, {stage.path.name})
    tracker.metrics({name: value for name, value in metrics.items() if name.startswith("val/")}, progress.step)
    draw_figures(ws, progress, stage, tracker, predictions, y)
    return metrics


def method_of(training: Finetune) -> str:
    return f"joint-alpha{training.alpha:g}" if training.mode == "joint" else training.mode


def uses_pretrained(training: Finetune) -> bool:
    return training.mode == "sequential" or training.init == "pretrained"


def fields_of(ws: Workspace, labels: Labels, origin: Workspace | None) -> dict[str, Any]:
    """What decides the finetuned weights."""
    tree = ws.resolved.as_dict()
    unread = {"sequential": ("alpha", "labeled_fraction", "init"), "joint": ("solver",)}.get(
        ws.recipe.finetune.mode, ("alpha", "labeled_fraction", "solver")
    )
    of_file = {"y": ws.card.y.model_dump(mode="json"), "val": Labels(ws.labels("val"), None).digest}
    return {
        "seed": tree["seed"],
        "data": {"card_sha256": ws.card.fingerprint, "scale": ws.resolved.scale},
        "labels": labels.digest,
        **({} if ws.data.card.y else {"label_file": of_file}),  # nothing else says what its labels mean, nor judges
        "guesses": labels.guess_digest,
        "model": tree["model"],
        "finetune": {name: value for name, value in tree["finetune"].items() if name not in unread},
        "precision": tree["precision"],
        "components": {name: entry["version"] for name, entry in tree["components"].items()},
        "pretrained_sha256": files.sha256_of(origin.pretrained_weights()) if origin else None,
    }


def choose_folder(run: Path, method: str, inputs: Inputs) -> StageFolder:
    """RUN/finetune/METHOD; where that was made from other labels or options, METHOD-<8 hex of the fingerprint>.

    A folder whose difference `inputs` allow is as good as its own.
    """
    own = files.digest(inputs.fields)
    first, other = (StageFolder(run / "finetune" / name) for name in (method, f"{method}-{own[:8]}"))
    if first.record().get("fingerprint") in (None, own):
        return first
    beside = [StageFolder(path.parent) for path in sorted((run / "finetune").glob(f"{method}-????????/{STAGE}"))]
    if other.record() or not inputs.allow:
        return other
    return next((stage for stage in (first, *beside) if not stage.refused(inputs)), other)


def check_mode(resolved: Resolved) -> None:
    """Raises RecipeError when the head, or the encoder under it, cannot be trained in the recipe's mode."""
    head, mode = resolved.head, resolved.recipe.finetune.mode
    if head.cls.fitted_at_once and mode != "sequential":
        raise RecipeError(
            f"model.head.name = {head.full_name}: is fitted on stored latents, so finetune.mode must be sequential, "
            f"not {mode}. "
            "Take a differentiable head (softmax, mlp), or --sequential."
        )
    encoder = resolved.encoder
    if not encoder.cls.differentiable and mode != "sequential":
        raise RecipeError(
            f"model.encoder.name = {encoder.full_name}: its code is a constant of each step, so l_Y cannot train it; "
            f"finetune.mode must be sequential, not {mode}."
        )


def check_origin(origin: Workspace) -> None:
    """Raises CheckpointError when the pretrained model is absent or is not the one this recipe describes."""
    origin.pretrained_weights()
    changes = diff(architecture(origin.pretrained.record()["fields"]), architecture(files.plain(origin.pretrain_fields())))
    if changes:
        raise CheckpointError(
            f"{origin.pretrained.path} is the checkpoint of another recipe:\n{changes}\n"
            "Finetune with the recipe it was made with, pretrain this one with --out ANOTHER_FOLDER, "
            "or set finetune.init: scratch."
        )


def architecture(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a pretraining's fields that decides which weights there are and what they see."""
    model = {name: fields["model"][name] for name in ("latent_dim", "encoder", "decoder")}
    kinds = ("encoder ", "decoder ")
    components = {name: version for name, version in fields["components"].items() if name.startswith(kinds)}
    return {"data": fields["data"], "model": model, "components": components}
