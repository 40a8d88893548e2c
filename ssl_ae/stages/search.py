"""search: the samples of a run whose codes are nearest to those of a query; and how often they have its label."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ae import distributed, files, latents
from ssl_ae.data.sources import PackOptions
from ssl_ae.errors import DataError, did_you_mean, listing
from ssl_ae.model import frozen
from ssl_ae.neighbours import Neighbours, agreement, nearest
from ssl_ae.runs import StageFolder
from ssl_ae.stages.extract import extract
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import features_for, open_any
from ssl_ae.stages.scoring import BATCH_ROWS
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import UNLABELED

JUDGED = "val"  # whose rows ask where precision is measured: never test's
HINTED = 5_000  # keys among which a misspelt one is looked for


@dataclass(frozen=True)
class Queries:
    """Samples to find the like of."""

    keys: list[str]
    x: np.ndarray  # (Q, *shape) as stored
    z: np.ndarray  # (Q, K)
    labels: np.ndarray  # (Q,) int64 with -1, or (Q, T) float32 with NaN
    rows: np.ndarray | None  # (Q,) where they lie in the split that is searched, if they do


def search(
    ws: Workspace, query: str, top: int = 10, split: str = "train", out: Path | None = None, options: PackOptions = PackOptions()
) -> Outcome:
    """The `top` samples of `split` nearest to a sample of the run's data (by its key) or to each sample of a file.

    Discrete codes compare by Hamming distance, real ones by Euclidean distance; a sample is not its own neighbour.
    """
    check_picture(out)
    ws.card.split(split)
    asked = by_key(ws, query, split)
    if asked is None:
        asked = from_file(ws, query, options)
    table = codes_of(ws, split)
    found = nearest(table.z, asked.z, top, symbol_of(ws), asked.rows)
    labels = ws.labels(split)
    if out is not None:
        draw(ws, asked, found, table.keys, labels, split, out)
    return Outcome(
        "search",
        ws.run,
        outputs={} if out is None else {"picture": out},
        metrics=precision_of_queries(ws, asked, found, labels, top),
        warnings=list(ws.reporter.warnings),
        more={"results": results(ws, asked, found, table.keys, labels)},
    )


def precision(ws: Workspace, top: int = 10, split: str = "train", queries: int | None = None) -> Outcome:
    """precision@top by label: the mean fraction of the `top` nearest codes that have the label of the sample that asks.

    Labelled validation rows ask (`queries` of them, evenly spaced; all by default), labelled rows of `split` answer. `chance`
    is what rows drawn at random would reach. Left in RUN/search/metrics.json and in MLflow.
    """
    if ws.card.y is None or ws.card.y.task != "classes":
        raise DataError(f"--precision compares classes, and {ws.data.path} has none. Give labels to the data set, or --query.")
    base, judged = codes_of(ws, split), codes_of(ws, JUDGED)
    there, asking = (np.flatnonzero(ws.labels(name) != UNLABELED) for name in (split, JUDGED))
    if not len(there) or not len(asking):
        empty = split if not len(there) else JUDGED
        raise DataError(f"split {empty!r} of {ws.data.path} has no labels to compare. Take another with --split, or label some.")
    if queries is not None and queries < len(asking):
        asking = asking[np.linspace(0, len(asking) - 1, queries).round().astype(np.int64)]
    known, wanted = ws.labels(split)[there], ws.labels(JUDGED)[asking]
    own = np.searchsorted(there, asking) if split == JUDGED else None
    found = nearest(base.z[there], judged.z[asking], top, symbol_of(ws), own)
    share = np.bincount(known, minlength=len(ws.card.y.names)) / len(known)
    metrics = {
        f"precision@{top}": float(agreement(wanted, known[found.rows]).mean()),
        "chance": float(share[wanted].mean()),
        "queries": float(len(wanted)),
    }
    return Outcome(
        "search",
        ws.run,
        outputs={"report": report(ws, split, metrics)},
        metrics=metrics,
        mlflow_run_id=StageFolder(ws.run / "search").mlflow_run_id(),
        warnings=list(ws.reporter.warnings),
        more={"results": []},
    )


def report(ws: Workspace, split: str, metrics: dict[str, float]) -> Path:
    """RUN/search/metrics.json, and an MLflow run."""
    stage = StageFolder(ws.run / "search")
    path = stage.path / "metrics.json"
    with distributed.main_first() as main:
        if main:
            files.make_folder(stage.path)
            files.write_json(path, {"split": split, **metrics})
    with ws.tracker(stage, "search", list(dict.fromkeys([split, JUDGED]))) as tracker:
        if distributed.is_main():
            tracker.metrics({f"search/{name.replace('@', '_at_')}": value for name, value in metrics.items()}, step=0)
    return path


def codes_of(ws: Workspace, split: str) -> latents.Latents:
    """The latents table of a split, extracted first where it is missing."""
    ws.card.split(split)
    extract(ws, [split])
    table = latents.read(ws.run / "latents" / split)
    if not len(table.keys):
        raise DataError(f"split {split!r} of {ws.data.path} is empty: there is nothing to search.")
    return table


def symbol_of(ws: Workspace) -> int | None:
    encoder = ws.resolved.encoder
    return encoder.cls.symbol(encoder.config)


def by_key(ws: Workspace, key: str, split: str) -> Queries | None:
    """The sample of that key, in the searched split or another."""
    for name in [split, *(other for other in ws.card.splits if other != split)]:
        samples = ws.data.split(name)
        rows = np.flatnonzero(samples.keys == key)[:1]
        if len(rows):
            z = codes_of(ws, name).z[rows]
            return Queries([key], samples.read(rows), z, ws.labels(name)[rows], rows if name == split else None)
    return None


def from_file(ws: Workspace, place: str, options: PackOptions) -> Queries:
    """Every sample of a file, folder or data set that `predict` reads. Raises DataError where there is none."""
    if not Path(place).exists():
        first = ws.data.split("train").keys[:HINTED].tolist()
        raise DataError(
            f"--query {place}: no sample of {ws.data.path} has this key, and there is no such file. Keys are like "
            f"{listing(first[:3], 'and')}.{did_you_mean(place, first)}"
        )
    keys, parts, codes = [], [], []
    model = ws.load_pretrained(ws.fresh_model(head=False))
    with tempfile.TemporaryDirectory(prefix="ssl-ae-") as aside:
        source = open_any(place, ws.card.x, Path(aside), ws.reporter, options)
        features = features_for(ws.card.x, source.card.x, place, ws.reporter)
        for name in source.card.splits:
            split = source.split(name)
            keys += split.keys.tolist()
            parts.append(split.read(np.arange(split.rows))[:, features])
    x = np.concatenate(parts)
    if not len(x):
        raise DataError(f"--query {place}: holds no samples. Name a file with one at least, or a key.")
    with frozen(model), torch.inference_mode():
        for start in range(0, len(x), BATCH_ROWS):
            rows = torch.as_tensor(x[start : start + BATCH_ROWS]).to(ws.device)
            codes.append(model.features(ws.scaling(rows)).float().cpu().numpy())
    unknown = np.full(len(x), UNLABELED)
    return Queries(keys, x, np.concatenate(codes), unknown, None)


def results(ws: Workspace, asked: Queries, found: Neighbours, keys: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """For each query its key and its neighbours, nearest first: key, distance and label, null where it is not known."""
    return [
        {
            "query": query,
            "neighbours": [
                {"key": str(keys[row]), "distance": distance.item(), "label": named(ws, labels[row])}
                for row, distance in zip(rows, distances, strict=True)
            ],
        }
        for query, rows, distances in zip(asked.keys, found.rows, found.distances, strict=True)
    ]


def named(ws: Workspace, label: np.ndarray) -> Any:
    """A class by its name, targets by theirs; None where unknown."""
    y = ws.card.y
    if y is None or (label.ndim == 0 and label == UNLABELED) or (label.ndim and np.isnan(label).all()):
        return None
    return y.names[int(label)] if label.ndim == 0 else dict(zip(y.names, label.tolist(), strict=True))


def precision_of_queries(ws: Workspace, asked: Queries, found: Neighbours, labels: np.ndarray, top: int) -> dict[str, float]:
    """precision@top over the queries whose class is known, where those of all their neighbours are."""
    if ws.card.y is None or ws.card.y.task != "classes":
        return {}
    known = (asked.labels != UNLABELED) & (labels[found.rows] != UNLABELED).all(1)
    if not known.any():
        return {}
    return {f"precision@{top}": float(agreement(asked.labels[known], labels[found.rows[known]]).mean())}


def check_picture(out: Path | None) -> None:
    if out is not None:
        files.check_name("--out", out, ".png", "the picture is a PNG file")


def draw(ws: Workspace, asked: Queries, found: Neighbours, keys: np.ndarray, labels: np.ndarray, split: str, out: Path) -> None:
    """The first queries and their neighbours as a picture."""
    from ssl_ae import figures

    most, few = figures.MAX_QUERIES, found.rows[: figures.MAX_QUERIES, : figures.MAX_NEIGHBOURS]
    samples = ws.data.split(split).read(few.ravel()).reshape(*few.shape, *ws.card.x.shape)
    captions = [
        [caption(ws, asked.labels[i]), *(caption(ws, labels[row], found.distances[i, j]) for j, row in enumerate(rows))]
        for i, rows in enumerate(few)
    ]
    x, distance = ws.card.x, "Euclidean" if symbol_of(ws) is None else "Hamming"
    limits = x.range if np.isfinite(x.range).all() else None
    detail = f"{ws.run.name}: label and {distance} distance in {split}"
    figures.neighbours(out, asked.x[:most], samples, asked.keys[:most], captions, x.kind, detail, limits)


def caption(ws: Workspace, label: np.ndarray, distance: np.generic | None = None) -> str:
    name = named(ws, label)
    words = [] if name is None or isinstance(name, dict) else [str(name)]
    return " · ".join([*words, *([] if distance is None else [f"{distance:.3g}"])])
