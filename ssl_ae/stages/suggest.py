"""suggest: which samples to label next, as a sheet that `--labels` reads once it is filled in."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_ae import distributed, files
from ssl_ae.choosing import margins, typical, uncertain
from ssl_ae.errors import DataError, RecipeError
from ssl_ae.stages.evaluate import model_of, workspace_of
from ssl_ae.stages.labels import Labels, labels_of
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import finished_method, finished_methods
from ssl_ae.stages.reconstruct import write_image
from ssl_ae.stages.scoring import predict_rows
from ssl_ae.stages.search import codes_of
from ssl_ae.stages.workspace import Workspace

SPLIT = "train"  # the only one that anything is learnt from
COLUMNS = ("key", "label", "thumbnail")


@dataclass(frozen=True)
class Choice:
    """Rows of the train split to label, and by which rule."""

    rows: np.ndarray  # (n,)
    rule: str
    labeled: int  # rows that have a label already
    margins: np.ndarray | None = None  # (n,) of the method that was asked


def suggest(ws: Workspace, budget: int, out: Path, method: str | None = None) -> Outcome:
    """Write `out`, a CSV of key, label (empty) and thumbnail, with the `budget` samples of train to label next.

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
            write_sheet(ws, chosen.rows, out)
    ws.reporter.say(f"suggest: {count:,} rows by {chosen.rule}; fill in the column label, then finetune --labels {out}")
    metrics = {"rows": float(count), "labeled": float(chosen.labeled)}
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
    labeled = labeled_rows(ws)
    refuse_full(ws, labeled)
    table = codes_of(ws, SPLIT)
    return Choice(typical(table.z, budget, labeled, ws.recipe.seed), "typical codes, spread by k-means", int(labeled.sum()))


def labeled_rows(ws: Workspace) -> np.ndarray:
    """(N,) bool: rows that have a label before anything is finetuned: in the recipe's file, or in the data where it takes all.

    Of a budget that is drawn (`per_class`, a total) nobody has asked for any label yet.
    """
    given = ws.recipe.data.labels
    if given == "all":
        return Labels(ws.data.labels(SPLIT), None).known
    return labels_of(ws).known if isinstance(given, str) else np.zeros(ws.data.split(SPLIT).rows, dtype=bool)


def by_method(ws: Workspace, budget: int, method: str | None) -> Choice:
    """By what a finished method, the last unless named, is unsure of."""
    stage = finished_method(ws.run, method)
    own = workspace_of(ws, stage)
    if own.card.y.task != "classes":
        raise DataError(
            f"{stage.path} predicts numbers, which have no margin. Ask a run that is only pretrained: it chooses by its codes."
        )
    labeled = labels_of(own).known
    refuse_full(ws, labeled)
    predictions = predict_rows(model_of(own, stage), own.feed(SPLIT))
    rows = uncertain(predictions.codes, predictions.values, budget, labeled, ws.recipe.seed)
    rule = f"smallest margins of {stage.path.name}, spread by k-means"
    return Choice(rows, rule, int(labeled.sum()), margins(predictions.values[rows]))


def refuse_full(ws: Workspace, labeled: np.ndarray) -> None:
    if labeled.all():
        raise DataError(f"every row of train of {ws.data.path} has a label already: there is nothing to suggest.")


def check_sheet(out: Path) -> None:
    if out.suffix != ".csv":
        raise RecipeError(f"--out {out}: the sheet is a CSV file; give a name that ends in .csv.")
    for place in (out, thumbnails_of(out)):
        if place.exists():
            raise RecipeError(f"{place} exists, and what was made of it would be lost. Name another sheet with --out.")


def thumbnails_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}-thumbnails")


def write_sheet(ws: Workspace, rows: np.ndarray, out: Path) -> None:
    """The sheet, and beside it a folder of thumbnails where samples are images."""
    samples = ws.data.split(SPLIT)
    pictures = [""] * len(rows)
    if ws.card.x.kind == "image":
        folder = thumbnails_of(out)
        pictures = [f"{folder.name}/{place:05d}.png" for place in range(1, len(rows) + 1)]
        with files.folder_aside(folder) as aside:
            for row, name in zip(rows, pictures, strict=True):
                write_image(aside / Path(name).name, samples.read(row[None])[0], ws.card.x)
            files.move_folder(aside, folder)
    sheet = io.StringIO()
    lines = csv.writer(sheet, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(zip(samples.keys[rows].tolist(), [""] * len(rows), pictures, strict=True))
    files.write_text(out, sheet.getvalue())
