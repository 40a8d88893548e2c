"""Label tables: who has which label, beside the shards and keyed by sample, so that new labels never rewrite data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_ae.data.card import Y
from ssl_ae.data.holdout import hash_order
from ssl_ae.data.keys import as_keys, repeated, rows_of
from ssl_ae.data.label_values import as_text, read_labels, read_numbers
from ssl_ae.data.sources.targets import UNLABELED
from ssl_ae.errors import DataError, did_you_mean, listing

REQUIRED = ("key", "label")
OPTIONAL = ("weight", "probability")
UNREAD = ("thumbnail",)  # for the eyes of who fills the table in
INDEX = "class index"  # in the metadata of what we write; a user's numbers may as well be the names of classes


@dataclass(frozen=True)
class LabelTable:
    """Labels of some samples, one row a key. `LabelTable.read` makes sure that keys are unique."""

    keys: np.ndarray  # (n,) text, by `as_keys`
    labels: np.ndarray  # (n,) int64 class index, -1 where unknown | (n, T) float32, NaN where unknown
    weight: np.ndarray | None = None  # (n,) float32, >= 0
    probability: np.ndarray | None = None  # (n,) float32 in [0, 1]: how sure a pseudo-label is; NaN where somebody labelled
    y: Y | None = None  # what the labels mean; always set by `read`

    @classmethod
    def read(cls, path: Path, y: Y | None = None) -> LabelTable:
        """Read `labels.parquet` or a user's CSV or Parquet with columns key, label [, weight] [, probability].

        Classes may be given by name or by index; in a CSV, a cell of several targets holds T numbers separated by
        blanks. Where `y` is None the labels say themselves what they mean. Raises DataError for unknown columns, a
        label that `y` does not allow, and two rows of one key that disagree.
        """
        columns, metadata = _columns(path)
        keys = _keys(path, columns["key"])
        y, labels = read_labels(path, columns["label"], y, indices=metadata.get("label") == INDEX)
        weight, probability = (read_numbers(path, name, columns[name]) if name in columns else None for name in OPTIONAL)
        _within(path, "weight", weight, 0, np.inf)
        _within(path, "probability", probability, 0, 1, empty=True)
        rows = _first_of_each_key(path, keys, [part for part in (labels, weight, probability) if part is not None])
        weight, probability = (part if part is None else part[rows] for part in (weight, probability))
        return cls(keys[rows], labels[rows], weight, probability, y)

    def write(self, path: Path) -> None:
        """Write `key, label` and, where given, `weight, probability`; -1 as null. Equal tables give equal bytes."""
        from ssl_ae import tables  # here, because pyarrow takes its time and most stages read no labels

        labels = self.labels
        if labels.ndim == 1:
            labels = np.ma.masked_array(labels.astype(np.int64), mask=labels == UNLABELED)
        columns = {"key": self.keys, "label": labels, "weight": self.weight, "probability": self.probability}
        metadata = {"label": INDEX} if labels.ndim == 1 else None
        tables.write_parquet(path, {name: column for name, column in columns.items() if column is not None}, metadata)

    def without_guesses(self) -> LabelTable:
        """The rows that somebody labelled: pseudo-labels, which have a probability, left out."""
        if self.probability is None:
            return self
        own = np.isnan(self.probability)
        return LabelTable(self.keys[own], self.labels[own], None if self.weight is None else self.weight[own], y=self.y)

    def labeled(self) -> LabelTable:
        """The rows that have a label."""
        known = self.labels != UNLABELED if self.labels.ndim == 1 else ~np.isnan(self.labels).all(axis=1)
        weight, probability = (part if part is None else part[known] for part in (self.weight, self.probability))
        return LabelTable(self.keys[known], self.labels[known], weight, probability, self.y)

    def check_keys(self, known: Iterable[str], place: str | Path) -> None:
        """Raise DataError when a row's key is none of the data set's."""
        strangers = sorted(set(self.keys).difference(known))
        if strangers:
            raise DataError(
                f"{place}: {len(strangers)} of {len(self.keys)} keys are not in the data set, "
                f"for example {listing(map(repr, strangers[:3]), 'and')}. Use the keys of the packed data."
            )


def aligned(table: LabelTable, keys: Sequence[str]) -> np.ndarray:
    """The labels in the order of `keys`: (n,) int64 with -1 where unknown, or (n, T) float32 with NaN there."""
    unknown = UNLABELED if table.labels.ndim == 1 else np.nan
    found = np.full((len(keys), *table.labels.shape[1:]), unknown, dtype=table.labels.dtype)
    rows = rows_of(as_keys(keys), as_keys(table.keys))
    found[rows >= 0] = table.labels[rows[rows >= 0]]
    return found


def draw(
    labels: np.ndarray,
    keys: Sequence[str],
    *,
    names: Sequence[str],
    seed: int,
    total: int | None = None,
    per_class: int | None = None,
) -> np.ndarray:
    """(n,) bool: the labelled rows that a budget of `total` labels, or of `per_class` labels a class, may use.

    The rows of a class are ranked by sha256(seed, key) and the first are taken, so the draw does not depend on the
    order of the rows, and a smaller budget is always a subset of a larger one of the same seed. `total` is shared
    equally; what does not divide goes to classes in an order that the seed decides. Labels (n, T) have no classes:
    `total` rows with a known target, by the same ranking.

    Raises DataError for a budget below 1 and where a class has fewer labels than asked.
    """
    name, asked = ("total", total) if per_class is None else ("per_class", per_class)
    if asked is None or (total is not None and per_class is not None):
        raise ValueError("give either total or per_class")
    if asked < 1:
        raise DataError(f"data.labels: {name} = {asked}: expected at least 1 label.")
    if labels.ndim == 2:
        if per_class is not None:
            raise DataError("data.labels: per_class needs classes, but the labels are numbers. Give a total, or all.")
        return _first_ranked(~np.isnan(labels).all(axis=1), keys, seed, asked, "the train split")
    chosen = np.zeros(len(labels), dtype=bool)
    for index, quota in enumerate(_quotas(len(names), seed, total, per_class)):
        chosen |= _first_ranked(labels == index, keys, seed, quota, f"class {names[index]!r}")
    return chosen


def _quotas(classes: int, seed: int, total: int | None, per_class: int | None) -> list[int]:
    if per_class is not None:
        return [per_class] * classes
    share, rest = divmod(total, classes)
    favoured = {int(index) for index in hash_order([str(index) for index in range(classes)], f"{seed}:class:")[:rest]}
    return [share + (index in favoured) for index in range(classes)]


def _first_ranked(among: np.ndarray, keys: Sequence[str], seed: int, count: int, owner: str) -> np.ndarray:
    rows = np.flatnonzero(among)
    if count > len(rows):
        raise DataError(
            f"data.labels: {owner} has {len(rows)} labels in the train split, but {count} are asked. "
            "Ask for fewer, or label more samples."
        )
    chosen = np.zeros(len(among), dtype=bool)
    chosen[rows[hash_order([keys[row] for row in rows], f"{seed}:")[:count]]] = True
    return chosen


def _columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from ssl_ae import tables

    suffix, metadata = path.suffix.lower(), {}
    if suffix == ".parquet":
        table = tables.read_parquet(path)
        columns, metadata = table.columns, table.metadata
    elif suffix == ".csv":
        batches = list(tables.read_batches(path))
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else ())}
    else:
        raise DataError(f"{path}: a label table is a .csv or a .parquet file with columns key and label.")
    for name in REQUIRED:
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}; a label table has key, label [, weight] [, probability].")
    for name in columns:
        if name not in (*REQUIRED, *OPTIONAL, *UNREAD):
            allowed = listing((*REQUIRED, *OPTIONAL), "and")
            raise DataError(f"{path}: column {name!r} is not one of {allowed}.{did_you_mean(name, (*REQUIRED, *OPTIONAL))}")
    return columns, metadata


def _keys(path: Path, column: np.ndarray) -> np.ndarray:
    keys = as_keys(as_text(column))
    missing = keys == ""
    if missing.any():
        raise DataError(f"{path}: row {int(missing.argmax()) + 1}: the key is missing. Every row needs one.")
    return keys


def _within(path: Path, name: str, column: np.ndarray | None, low: float, high: float, empty: bool = False) -> None:
    if column is None:
        return
    wrong = ~((column >= low) & (column <= high) & np.isfinite(column)) & ~(np.isnan(column) & empty)
    if wrong.any():
        row = int(wrong.argmax())
        expected = "a number of at least 0" if high == np.inf else f"a number in [{low}, {high}]"
        raise DataError(f"{path}: row {row + 1}: {name} = {column[row]:g}: expected {expected}.")


def _first_of_each_key(path: Path, keys: np.ndarray, columns: Sequence[np.ndarray]) -> np.ndarray:
    """The first row of every key, in the table's order; the later rows of a key must say the same."""
    if repeated([keys]) is None:
        return np.arange(len(keys))
    _, first, group = np.unique(keys.astype(object), return_index=True, return_inverse=True)
    for column in columns:
        known = column[first[group]]
        same = (column == known) | ((column != column) & (known != known))  # NaN agrees with NaN
        wrong = ~same.reshape(len(keys), -1).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{path}: rows {int(first[group[row]]) + 1} and {row + 1} disagree about the key {keys[row]!r}. Keep one of them."
            )
    return np.sort(first)
