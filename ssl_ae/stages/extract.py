"""extract: the code of every sample into Parquet, on as many ranks as there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_ae import distributed, files, latents
from ssl_ae.data import card as cards
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Rows, Scaling
from ssl_ae.errors import DataError, RecipeError, did_you_mean, listing
from ssl_ae.model import Model, frozen, layers_of
from ssl_ae.runs import StageFolder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.workspace import Workspace, tolerance_of
from ssl_ae.tracking import Tracker

BATCH_ROWS = 1024
MAP = "_map.png"  # of the latents in the plane
TAKEN = ("journal", "mlflow_run_id")  # what a stage keeps beside its splits
FOLDER = re.compile(r"[^/\\._\x00-\x1f][^/\\\x00-\x1f]{0,99}")  # a name that stands for one folder, and for no hidden one

Columns = Callable[[Model, Tensor], dict[str, Tensor]]  # x (B, *shapes.x) -> what is stored of these rows, each (B, ...)


def extract(
    ws: Workspace,
    splits: Sequence[str] | None = None,
    data: Path | str | None = None,
    scores: bool = False,
    layer: str | None = None,
) -> Outcome:
    """Write `latents/SPLIT/` for the given splits (all), or `latents/NAME/SPLIT/` for another data set.

    With `layer`, the values of that layer in place of the code, flat, below `layers/LAYER/` in place of `latents/`. Raises
    RecipeError for a layer that the model does not have, DataError for data whose samples or name do not fit.
    """
    weights = ws.pretrained_weights()
    if layer is not None:
        check_layer(ws, layer)
    stage = StageFolder(ws.run / "latents" if layer is None else ws.run / "layers" / layer)
    source = ws.data if data is None else other_data(ws, data)
    folder = stage.path if data is None else stage.path / source.card.name
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
            **({} if layer is None else {"layer": layer}),
        }
        if latents.is_current(place, facts) or latents.is_current(place, facts | {"scores": "true"}):
            ws.reporter.say(f"extract: {split} already in {place}")
        else:
            missing[split] = facts
    shown = map_of(ws, outputs) if data is None and ws.published else None
    with distributed.main_first() as main:
        if main and missing and shown:
            (stage.path / MAP).unlink(missing_ok=True)  # else one of other weights stays where this is killed before it draws
    undrawn = distributed.from_main(shown is not None and not (stage.path / MAP).exists())
    metrics = {}
    if missing or undrawn:
        name = "extract" if layer is None else f"extract-{layer}"
        with ws.tracker(stage, name, [*missing] if data is None else []) as tracker:
            if missing:
                metrics = write_splits(ws, source, folder, missing, columns_of(ws, scores, layer), tracker)
            if undrawn and distributed.is_main():
                draw_map(ws, stage.path / MAP, outputs[shown], tracker)
    return Outcome(
        "extract",
        ws.run,
        "done" if missing or undrawn else "skipped",
        outputs,
        metrics,
        mlflow_run_id=stage.mlflow_run_id(),
        warnings=list(ws.reporter.warnings),
    )


def check_layer(ws: Workspace, layer: str) -> None:
    """Raises RecipeError for a layer that no pass through the model taps."""
    layers = layers_of(ws.fresh_model(head=False), ws.resolved.shapes)
    if layer not in layers:
        raise RecipeError(
            f"--layer {layer}: the model of {ws.run} has no such layer; it has {listing(layers, 'and')}."
            + did_you_mean(layer, layers)
        )


def columns_of(ws: Workspace, scores: bool, layer: str | None) -> Columns:
    """What is stored of each row: a layer, or the code with what belongs to it.

    latent (n, K), latent_std (n, K) of a random posterior, and with `scores` reconstruction_nats (n,) at E[z|x].
    """
    encoder = ws.resolved.encoder
    # without a label, a conditional encoder gives features, which are certain
    random = encoder.cls.posterior(encoder.config) != "point" and not encoder.cls.conditional

    def of_layer(model: Model, x: Tensor) -> dict[str, Tensor]:
        return {"latent": model.layer(x, layer).flatten(1)}

    def of_code(model: Model, x: Tensor) -> dict[str, Tensor]:
        q, p_x = model.round_trip(x) if scores else (model.posterior(x), None)
        found = {"latent": q.mean} | ({"latent_std": q.stddev} if random else {})
        return found if p_x is None else found | {"reconstruction_nats": -p_x.log_prob(x)}

    return of_code if layer is None else of_layer


def write_splits(
    ws: Workspace, source: DataSet, folder: Path, missing: dict[str, dict[str, str]], columns_of: Columns, tracker: Tracker
) -> dict[str, float]:
    """The tables of some splits, each with the facts it is made from; rows and, where it is stored, the mean l_X of each."""
    metrics = {}
    model = ws.load_pretrained(ws.fresh_model(head=False))
    for split, facts in missing.items():
        rows = source.card.split(split).rows
        ws.reporter.say(f"extract: {rows:,} rows of {split} into {folder / split}")
        metrics |= write_split(ws, model, source, split, folder / split, facts, columns_of, tracker)
    return metrics


def write_split(
    ws: Workspace,
    model: Model,
    source: DataSet,
    split: str,
    folder: Path,
    facts: dict[str, str],
    columns_of: Columns,
    tracker: Tracker | None = None,
) -> dict[str, float]:
    """Each rank writes every world-th part that is not there yet; the manifest comes last, when all are and are told of.

    An interrupted table goes on, on any number of ranks: a part depends on its rows alone.
    Samples are read once and in order, a batch at a time, so memory holds one part however large the split is.
    """
    samples, keys, labels = source.split(split), source.split(split).keys, source.labels(split)
    parts = latents.parts_of(samples.rows)
    with distributed.main_first() as main:
        if main:
            latents.begin(folder, facts)
    nats = []
    with ws.reporter.bar(f"extract {split}", samples.rows) as advance:
        for i in range(distributed.rank(), len(parts), distributed.world()):
            part = slice(parts[i].start, parts[i].stop)
            columns = stored_part(ws, folder, i, keys[part], facts)
            if columns is None:
                columns = encode(model, samples, parts[i], ws.scaling, ws.device, columns_of)
                latents.write_part(latents.part_of(folder, i), {"key": keys[part], "label": labels[part], **columns}, facts)
            nats.append(columns.get("reconstruction_nats", np.empty(0)))
            advance(len(parts[i]) * distributed.world(), "")
    own = np.concatenate(nats) if nats else np.empty(0)
    total, count = distributed.sum_over_ranks(torch.tensor([own.sum(), len(own)], dtype=torch.float64)).tolist()
    metrics = ({f"{split}/reconstruction_nats": total / count} if count else {}) | {f"{split}/rows": float(samples.rows)}
    distributed.barrier()
    with distributed.main_first() as main:
        if main:
            if tracker is not None:  # before the manifest: nobody comes back to a finished table
                tracker.metrics(metrics, step=0)
            latents.finish(folder, samples.rows, facts, source.card.y.task if source.card.y else None)
    return metrics


def stored_part(ws: Workspace, folder: Path, index: int, keys: np.ndarray, facts: dict[str, str]) -> dict[str, np.ndarray] | None:
    """The columns of a part that an interrupted extraction has finished; a damaged one is made again, aloud."""
    try:
        found = latents.written(folder, index, keys, facts)
    except DataError as error:
        ws.reporter.warn(f"{error} It is made again.")
        return None
    return None if found is None else found.columns


def encode(
    model: Model, samples: Rows, rows: range, scaling: Scaling, device: torch.device, columns_of: Columns
) -> dict[str, np.ndarray]:
    """The columns of some rows, each (n, ...) float32, in evaluation mode."""
    columns: dict[str, Tensor] = {}  # on the device, so that nothing waits for it before the end
    with frozen(model), torch.inference_mode():
        for at in range(0, len(rows), BATCH_ROWS):
            stored = samples.read(np.asarray(rows[at : at + BATCH_ROWS]))
            x = scaling(torch.from_numpy(stored).to(device, non_blocking=True))
            for name, value in columns_of(model, x).items():
                if name not in columns:
                    columns[name] = torch.empty(len(rows), *value.shape[1:], device=device)
                columns[name][at : at + len(x)] = value
    return {name: column.cpu().numpy() for name, column in columns.items()}


def other_data(ws: Workspace, path: Path | str) -> DataSet:
    """Another data set of the same kind of samples. Raises DataError when its samples do not fit the model, or its name."""
    data = DataSet.open(path, tolerance=tolerance_of(ws.recipe))
    for line in data.losses:
        ws.reporter.warn(line)
    if not FOLDER.fullmatch(data.card.name):
        raise DataError(
            f"{path} is called {data.card.name[:80]!r}, and its latents go into a folder of its name: expected a name without / "
            f"and \\ that begins with neither . nor _. Give it another `name` in {data.folder / cards.FILE_NAME}."
        )
    if data.card.name in (*cards.SPLITS, *ws.card.splits, *TAKEN):
        card = data.folder / cards.FILE_NAME
        cure = f"Give it another `name` in {card}." if card.exists() else "Rename the folder."
        raise DataError(f"{path} is called {data.card.name!r}, and latents/{data.card.name} is a place of the run's own. {cure}")
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


def map_of(ws: Workspace, outputs: dict[str, Path]) -> str | None:
    """The split whose latents are drawn: validation, or train where that has no rows."""
    return next((name for name in ("val", "train") if name in outputs and ws.card.splits[name].rows > 1), None)


def draw_map(ws: Workspace, path: Path, folder: Path, tracker: Tracker) -> None:
    """A 2-D map of the latents in a folder, coloured by class."""
    from ssl_ae import figures

    table = latents.read(folder)
    names = ws.card.y.names if ws.card.y else ()
    tracker.artifact(figures.latent_map(path, table.z, table.labels, names), "figures")
