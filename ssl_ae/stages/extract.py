"""extract: the code of every sample into Parquet, on as many ranks as there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ssl_ae import distributed, files, latents
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Feed
from ssl_ae.errors import DataError, listing
from ssl_ae.model import Model, frozen
from ssl_ae.runs import StageFolder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker

BATCH_ROWS = 1024
MAP = "_map.png"  # of the latents in the plane


def extract(ws: Workspace, splits: Sequence[str] | None = None, data: Path | None = None, scores: bool = False) -> Outcome:
    """Write `latents/SPLIT/` for the given splits (all), or `latents/NAME/SPLIT/` for another data set."""
    weights = ws.pretrained_weights()
    source = ws.data if data is None else other_data(ws, data)
    folder = ws.run / "latents" if data is None else ws.run / "latents" / source.card.name
    outputs = {split: folder / split for split in splits or source.card.splits}
    missing = {}
    for split, place in outputs.items():
        source.card.split(split)
        facts = {
            "recipe_fingerprint": ws.pretrained.fingerprint,
            "checkpoint_sha256": files.sha256_of(weights),
            "data_fingerprint": source.card.fingerprint,
            "labels_sha256": source.labels_sha256 or "",
            "scores": str(scores).lower(),
        }
        if latents.is_current(place, facts) or latents.is_current(place, facts | {"scores": "true"}):
            ws.reporter.say(f"extract: {split} already in {place}")
        else:
            missing[split] = facts
    stage, metrics = StageFolder(ws.run / "latents"), {}
    if missing:
        with ws.tracker(stage, "extract", [*missing] if data is None else []) as tracker:
            metrics = write_splits(ws, source, folder, missing, scores)
            if distributed.is_main():
                tracker.metrics(metrics, step=0)
                if data is None:
                    draw_map(ws, outputs, tracker)
    return Outcome(
        "extract",
        ws.run,
        "done" if missing else "skipped",
        outputs,
        metrics,
        mlflow_run_id=stage.mlflow_run_id(),
        warnings=list(ws.reporter.warnings),
    )


def write_splits(
    ws: Workspace, source: DataSet, folder: Path, missing: dict[str, dict[str, str]], scores: bool
) -> dict[str, float]:
    """The tables of some splits, each with the facts it is made from; rows and, with `scores`, the mean l_X of each."""
    metrics = {}
    model = ws.load_pretrained(ws.fresh_model(head=False))
    for split, facts in missing.items():
        rows = source.card.split(split).rows
        ws.reporter.say(f"extract: {rows:,} rows of {split} into {folder / split}")
        metrics |= write_split(ws, model, source, split, folder / split, facts, scores)
        metrics[f"{split}/rows"] = float(rows)
    return metrics


def write_split(
    ws: Workspace, model: Model, source: DataSet, split: str, folder: Path, facts: dict[str, str], scores: bool
) -> dict[str, float]:
    """Each rank writes every world-th part; the manifest comes last, when all are there."""
    feed = Feed(source.split(split), None, ws.scaling, seed=ws.recipe.seed, device=ws.device, residency=ws.recipe.data.residency)
    keys, labels = source.split(split).keys, source.labels(split)
    parts = latents.parts_of(feed.split.rows)
    with distributed.main_first() as main:
        if main:
            (folder / latents.MANIFEST).unlink(missing_ok=True)
    nats = []
    with ws.reporter.bar(f"extract {split}", feed.split.rows) as advance:
        for i in range(distributed.rank(), len(parts), distributed.world()):
            rows = np.asarray(parts[i])
            columns = {"key": keys[rows], "label": labels[rows], **encode(ws, model, feed, rows, scores)}
            latents.write_part(latents.part_of(folder, i), columns, facts)
            nats.append(columns.get("reconstruction_nats", np.empty(0)))
            advance(len(rows) * distributed.world(), "")
    distributed.barrier()
    with distributed.main_first() as main:
        if main:
            latents.finish(folder, feed.split.rows, facts, source.card.y.task if source.card.y else None)
    own = np.concatenate(nats) if nats else np.empty(0)
    total, count = distributed.sum_over_ranks(torch.tensor([own.sum(), len(own)], dtype=torch.float64)).tolist()
    return {f"{split}/reconstruction_nats": total / count} if scores and count else {}


def encode(ws: Workspace, model: Model, feed: Feed, rows: np.ndarray, scores: bool) -> dict[str, np.ndarray]:
    """latent (n, K), latent_std (n, K) of a random posterior, and with `scores` reconstruction_nats (n,) at E[z|x]."""
    encoder = ws.resolved.encoder
    random = encoder.cls.posterior(encoder.config) != "point"
    columns: dict[str, list[np.ndarray]] = {}
    with frozen(model), torch.inference_mode():
        for batch in feed.in_order(BATCH_ROWS, rows):
            q = model.posterior(batch.x)
            found = {"latent": q.mean} | ({"latent_std": q.stddev} if random else {})
            if scores:
                found["reconstruction_nats"] = -model.decode(q.mean).log_prob(batch.target)
            for name, value in found.items():
                columns.setdefault(name, []).append(value.float().cpu().numpy())
    return {name: np.concatenate(values) for name, values in columns.items()}


def other_data(ws: Workspace, path: Path) -> DataSet:
    """Another data set of the same kind of samples. Raises DataError when its samples do not fit the model."""
    data = DataSet.open(path)
    ours, theirs = ws.card.x, data.card.x
    same_units = ours.kind == "vector" or theirs.range == ours.range
    if theirs.shape != ours.shape or not same_units:
        raise DataError(
            f"{path} holds samples of shape {theirs.shape} and range {theirs.range}; "
            f"the model of {ws.run} takes {ours.shape} and range {ours.range}."
        )
    if theirs.features != ours.features:
        found, expected = (listing(x.features or ("unnamed",), "and") for x in (theirs, ours))
        raise DataError(
            f"the columns of {path} are {found} instead of {expected}, as in {ws.data.path}. "
            "Pack the source again with its columns in that order."
        )
    return data


def draw_map(ws: Workspace, outputs: dict[str, Path], tracker: Tracker) -> None:
    """A 2-D map of the validation latents (train where there are none), coloured by class."""
    from ssl_ae import figures

    split = next((name for name in ("val", "train") if name in outputs and ws.card.splits[name].rows > 1), None)
    if split is None:
        return
    table = latents.read(outputs[split])
    names = ws.card.y.names if ws.card.y else ()
    tracker.artifact(figures.latent_map(ws.run / "latents" / MAP, table.z, table.labels, names), "figures")
