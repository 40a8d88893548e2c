"""Which labels training may look at: the recipe's budget, a file, or all; and the same for everyone who compares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssl_ae import files, tables
from ssl_ae.data.keys import as_keys, repeated, rows_of
from ssl_ae.data.label_values import as_text, read_numbers
from ssl_ae.data.labels import LabelTable, aligned, draw
from ssl_ae.errors import DataError, RecipeError
from ssl_ae.resolve import Resolved
from ssl_ae.stages.stored import label_file
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import UNLABELED, Need


@dataclass(frozen=True)
class Labels:
    """Labels of the train split that a run may use."""

    y: np.ndarray  # (N,) int64 with -1, or (N, T) float32 with NaN
    weight: np.ndarray | None  # (N,) weight in l_Y
    guess: np.ndarray | None = None  # (N, C) float32, class probabilities by an earlier model, 0 in rows without

    @property
    def known(self) -> np.ndarray:
        """(N,) bool."""
        return self.y != UNLABELED if self.y.ndim == 1 else ~np.isnan(self.y).all(1)

    @property
    def count(self) -> int:
        return int(self.known.sum())

    @property
    def digest(self) -> str:
        """sha256 of who has which label."""
        weight = [] if self.weight is None else self.weight[self.known].tolist()
        return files.digest([np.flatnonzero(self.known).tolist(), self.y[self.known].tolist(), weight])

    @property
    def guess_digest(self) -> str | None:
        """sha256 of the guesses."""
        return None if self.guess is None else hashlib.sha256(self.guess.tobytes()).hexdigest()


def labels_of(ws: Workspace) -> Labels:
    """Raises DataError where there is no label at all, and where the budget asks for more than there are."""
    budget, data = ws.recipe.data.labels, ws.data
    weight = None
    if (given := label_file(ws.recipe)) is not None:
        table = data.read_labels(given)
        keys = data.split("train").keys
        y = aligned(table, keys)
        if table.weight is not None:
            weight = np.ones(len(keys), np.float32)
            weight_of = dict(zip(table.keys, table.weight, strict=True))
            weight[:] = [weight_of.get(key, 1.0) for key in keys]
        found = Labels(y, weight)
    else:
        y = data.labels("train")
        found = Labels(y, None)
        if budget != "all" and found.count:
            chosen = draw(
                y,
                data.split("train").keys,
                names=ws.card.y.names,
                seed=budget.seed,
                total=budget.total,
                per_class=budget.per_class,
            )
            unknown = UNLABELED if y.ndim == 1 else np.nan
            found = Labels(np.where(chosen if y.ndim == 1 else chosen[:, None], y, unknown).astype(y.dtype), None)
    if found.weight is not None and found.count and not found.weight[found.known].any():
        raise DataError(f"{budget}: every label of a train row has weight 0, and finetune needs some above it.")
    if found.count == 0:
        raise DataError(
            f"no row of the train split of {data.path} has a label, and finetune needs some. "
            "Name a file with columns key and label: --labels FILE."
        )
    return found


def table_of(ws: Workspace) -> LabelTable:
    """What `labels_of` takes, keyed by sample; of a file every row that has a label, also of other splits and guessed ones."""
    given = label_file(ws.recipe)
    return table_from(labels_of(ws), ws) if given is None else ws.data.read_labels(given).labeled()


def table_from(labels: Labels, ws: Workspace) -> LabelTable:
    """Labels of the train split, keyed by sample."""
    rows = np.flatnonzero(labels.known)
    return LabelTable(as_keys(ws.data.split("train").keys)[rows], labels.y[rows], y=ws.card.y)


def with_guesses(ws: Workspace, labels: Labels) -> Labels:
    """The labels, and what an earlier model guesses of the rows, where a regularizer of the recipe learns from that.

    Raises RecipeError where they are not named, DataError for a table that is not of these rows or classes.
    """
    check_guesses(ws.resolved)
    wanted = any(Need.GUESS in part.cls.needs for part in ws.resolved.regularizers)
    return replace(labels, guess=read_guesses(ws, Path(ws.recipe.data.guesses))) if wanted else labels


def check_guesses(resolved: Resolved, coming: bool = False) -> None:
    """Raises RecipeError where a regularizer learns from guesses and none are named, nor `coming` from a stage before."""
    eager = [part.full_name for part in resolved.regularizers if Need.GUESS in part.cls.needs]
    training, named = resolved.recipe.finetune, resolved.recipe.data.guesses
    if eager and training.mode != "sequential" and named is None and not coming:
        raise RecipeError(
            f"regularizer {eager[0]} learns from the guesses of an earlier model. Name them: `ssl-ae predict RUN DATA --split "
            "train --out FILE.parquet`, then --set data.guesses=FILE.parquet; or put the stage predict before this one."
        )


def read_guesses(ws: Workspace, path: Path) -> np.ndarray:
    """(N, C) float32: the columns p_CLASS of a table of predictions in the order of the train rows; 0 in rows it lacks."""
    names, keys = ws.card.y.names, ws.data.split("train").keys
    columns = tables.read_parquet(path).columns
    wanted = ["key", *(f"p_{name}" for name in names)]
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(
            f"data.guesses = {path}: has no column {missing[0]!r}; expected the predictions of a classifier of these "
            f"{len(names)} classes, as `ssl-ae predict` writes them."
        )
    p = np.stack([read_numbers(path, name, columns[name]) for name in wanted[1:]], axis=1)
    wrong = ~(np.isfinite(p).all(1) & (p >= 0).all(1) & (np.abs(p.sum(1) - 1) < 1e-3))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"data.guesses = {path}: row {row + 1} holds no probabilities of sum 1: {p[row].tolist()[:10]}.")
    guessed = as_keys(as_text(columns["key"]))
    if (again := repeated([guessed])) is not None:
        raise DataError(f"data.guesses = {path}: the key {again!r} stands in several rows. Keep one of them.")
    rows = rows_of(as_keys(keys), guessed)
    if not (rows >= 0).any():
        raise DataError(f"data.guesses = {path}: none of its {len(p):,} keys is a train row of {ws.data.path}.")
    guess = np.zeros((len(keys), len(names)), np.float32)
    guess[rows >= 0] = p[rows[rows >= 0]]
    return guess
