"""suggest: which samples to label next, as a sheet that `--labels` reads once it is filled in."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_ae import distributed, files
from ssl_ae.choosing import margins, typical, uncertain
from ssl_ae.data.card import Y
from ssl_ae.data.keys import as_keys, rows_of
from ssl_ae.data.labels import LabelTable
from ssl_ae.errors import DataError, RecipeError
from ssl_ae.stages.evaluate import model_of, workspace_of
from ssl_ae.stages.labels import Labels, table_from, table_of
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import finished_method, finished_methods
from ssl_ae.stages.reconstruct import write_image
from ssl_ae.stages.scoring import predict_rows
from ssl_ae.stages.search import codes_of
from ssl_ae.stages.stored import label_file
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import UNLABELED

SPLIT = "train"  # the only one that anything is learnt from


@dataclass(frozen=True)
class Choice:
    """Rows of the train split to label, and by which rule."""

    rows: np.ndarray  # (n,)
    rule: str
    labels: LabelTable  # that there are already, also of other splits
    left: int  # rows of train that have no label and get none by this sheet
    margins: np.ndarray | None = None  # (n,) of the method that was asked


def suggest(ws: Workspace, budget: int, out: Path, method: str | None = None) -> Outcome:
    """Write `out`, a CSV of key, label (empty) and thumbnail, with the `budget` samples of train to label next.

    Below them come the labels that there are, so that the sheet alone is what `--labels` takes once it is filled in.

    Without a finetuned model: rows that are typical of the codes and far from each other. With one: rows that it is unsure
    of, unlike each other. Raises RecipeError for a sheet that is there already, because its labels would be lost, and
    DataError where every row has its label.
    """
    check_sheet(out)
    asked = method is not None or finished_methods(ws.run)
    chosen = by_method(ws, budget, method) if asked else cold_start(ws, budget)
    count = len(chosen.rows)
    if count < budget:
        ws.reporter.warn(f"--budget {budget}: only {count:,} rows of train have no label yet; all of them are in {out}.")
    with distributed.main_first() as main:
        if main:
            write_sheet(ws, chosen, out)
    there = len(chosen.labels.keys)
    below = f" (below them are the {there:,} that there are)" if there else ""
    ws.reporter.say(f"suggest: {count:,} rows by {chosen.rule}; fill in their labels{below}, then give --labels {out}")
    classes = ws.card.y is None or ws.card.y.task == "classes"
    if not asked and classes and chosen.left:
        ws.reporter.say(
            "suggest: once a model is finetuned on this sheet, the next follows its doubts; "
            "half of a budget on each often tells it more than all of it on this one"
        )
    metrics = {"rows": float(count), "labeled": float(there)}
    if chosen.margins is not None:
        metrics["margin"] = float(chosen.margins.mean())
    return Outcome(
        "suggest",
        ws.run,
        outputs={"sheet": out},
        metrics=metrics,
        warnings=list(ws.reporter.warnings),
        more={"rule": chosen.rule},
    )


def cold_start(ws: Workspace, budget: int) -> Choice:
    """By the codes alone."""
    labels = labels_before(ws)
    known = known_rows(ws, labels)
    rows = typical(codes_of(ws, SPLIT).z, budget, known, ws.recipe.seed)
    return Choice(rows, "typical codes, spread by k-means", labels, int((~known).sum()) - len(rows))


def labels_before(ws: Workspace) -> LabelTable:
    """Labels that there are before anything is finetuned: in the recipe's file, or in the data where it takes all.

    Of a budget that is drawn (`per_class`, a total) nobody has asked for any label yet.
    """
    if label_file(ws.recipe) is not None:
        return table_of(ws)
    known = ws.data.labels(SPLIT) if ws.recipe.data.labels == "all" else np.full(ws.data.split(SPLIT).rows, UNLABELED)
    return table_from(Labels(known, None), ws)


def by_method(ws: Workspace, budget: int, method: str | None) -> Choice:
    """By what a finished method, the last unless named, is unsure of."""
    stage = finished_method(ws.run, method)
    own = workspace_of(ws, stage)
    if own.card.y.task != "classes":
        raise DataError(
            f"{stage.path} predicts numbers, which have no margin. Ask a run that is only pretrained: it chooses by its codes."
        )
    labels = table_of(own)
    known = known_rows(ws, labels)
    predictions = predict_rows(model_of(own, stage), own.feed(SPLIT))
    rows = uncertain(predictions.codes, predictions.values, budget, known, ws.recipe.seed)
    rule = f"smallest margins of {stage.path.name}, spread by k-means"
    return Choice(rows, rule, labels, int((~known).sum()) - len(rows), margins(predictions.values[rows]))


def known_rows(ws: Workspace, labels: LabelTable) -> np.ndarray:
    """(N,) bool: train rows that have a label. Raises DataError where all have."""
    known = rows_of(as_keys(ws.data.split(SPLIT).keys), labels.keys) >= 0
    if known.all():
        raise DataError(f"every row of train of {ws.data.path} has a label already: there is nothing to suggest.")
    return known


def check_sheet(out: Path) -> None:
    if out.suffix != ".csv":
        raise RecipeError(f"--out {out}: the sheet is a CSV file; give a name that ends in .csv.")
    for place in (out, thumbnails_of(out)):
        if place.exists():
            raise RecipeError(f"{place} exists, and what was made of it would be lost. Name another sheet with --out.")


def thumbnails_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}-thumbnails")


def write_sheet(ws: Workspace, chosen: Choice, out: Path) -> None:
    """The sheet, and beside it a folder of thumbnails where samples are images."""
    samples, labels = ws.data.split(SPLIT), chosen.labels
    pictures = [""] * len(chosen.rows)
    if ws.card.x.kind == "image":
        folder = thumbnails_of(out)
        pictures = [f"{folder.name}/{place:05d}.png" for place in range(1, len(pictures) + 1)]
        with files.folder_aside(folder) as aside:
            for row, name in zip(chosen.rows, pictures, strict=True):
                write_image(aside / Path(name).name, samples.read(row[None])[0], ws.card.x)
            files.move_folder(aside, folder)
    columns = {
        "key": [*samples.keys[chosen.rows], *labels.keys],
        "label": [""] * len(chosen.rows) + [cell_of(label, labels.y) for label in labels.labels],
        "thumbnail": pictures + [""] * len(labels.keys),
    }
    if labels.weight is not None:
        columns["weight"] = ["1"] * len(chosen.rows) + [str(weight) for weight in labels.weight]
    if labels.probability is not None:  # of guesses alone
        columns["probability"] = [""] * len(chosen.rows) + ["" if np.isnan(p) else str(p) for p in labels.probability]
    sheet = io.StringIO()
    lines = csv.writer(sheet, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(zip(*columns.values(), strict=True))
    files.write_text(out, sheet.getvalue())


def cell_of(label: np.ndarray, y: Y) -> str:
    """A label as a sheet has it: the name of its class, or its numbers with blanks between them."""
    return y.names[label] if label.ndim == 0 else " ".join(map(str, label))
