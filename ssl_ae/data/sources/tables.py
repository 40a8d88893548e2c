"""Tables of numbers in CSV or Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssl_ae.data.card import SPLITS, X
from ssl_ae.data.sources import (
    TO_BE_MEASURED,
    Block,
    Description,
    PackOptions,
    Source,
    name_of,
    numbered_keys,
    path_of,
    rows_a_block,
)
from ssl_ae.data.sources.targets import Targets, targets_of
from ssl_ae.errors import DataError, did_you_mean, listing

ENDINGS = {".csv", ".parquet"}
SPLIT_NAMES = (
    ("train", re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE)),
    ("val", re.compile(r"val(id|idation)?(?![a-z])", re.IGNORECASE)),
    ("test", re.compile(r"test(ing)?(?![a-z])", re.IGNORECASE)),
)


class Table(Source):
    """A `.csv` (with a header) or `.parquet` file of numbers, or a folder of them: `train...`, `val...`, `test...`.

    Every column is a feature, in the order of the first train file, except the label and the key: --label and --key
    name them, and columns called `label` and `key` are taken for them unasked. --label a,b,c names several targets. A
    row without a label is unlabelled; a feature must be a finite number in every row. Files of one split are joined in
    the order of their names, and a split may lack the label column. Keys are the key column or `train-00000000`, ...
    """

    name = "table"
    summary = "a CSV or Parquet file of numbers, or a folder with train, val and test files"

    @classmethod
    def recognises(cls, place: str) -> bool:
        path = path_of(place)
        return "train" in _by_split(path) if path.is_dir() else path.is_file() and path.suffix.lower() in ENDINGS

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name, "label", "key", "task")
        self._place = path_of(place)
        self._files = _by_split(self._place) if self._place.is_dir() else {"train": [self._place]}
        first = self._files["train"][0]
        columns = _columns_of(first)
        self._labels = _label_columns(first, columns, options)
        self._key = _key_column(first, columns, options)
        self._features = tuple(name for name in columns if name not in (*self._labels, self._key))
        if not self._features:
            raise DataError(f"{first} has no column left for features. It has {listing(columns, 'and')}.")
        self._x = X(
            kind="vector",
            dtype="float32",
            shape=(len(self._features),),
            range=TO_BE_MEASURED,
            features=self._features,
        )
        self._keys, self._targets, self._rows_before = self._read_side_columns(options)

    def describe(self) -> Description:
        name = name_of(str(self._place))
        return Description(name, self._x, self._targets.task, self._targets.names, tuple(self._files))

    def keys(self, split: str) -> Sequence[str]:
        return self._keys[split]

    def blocks(self, split: str) -> Iterator[Block]:
        start, step = 0, rows_a_block(self._x)
        labels, before = self._targets.values, self._rows_before[split]
        for file in self._files[split]:
            first_row = 0
            for batch in _batches(file):
                x = self._features_of(file, batch, first_row)
                first_row += len(x)
                for part in (x[begin : begin + step] for begin in range(0, len(x), step)):
                    stop = start + len(part)
                    mine = None if labels is None else labels[before + start : before + stop]
                    yield Block(self._keys[split][start:stop], part, mine)
                    start = stop

    def _features_of(self, file: Path, batch: dict[str, np.ndarray], first_row: int) -> np.ndarray:
        """(n, D) float32."""
        x = np.empty((len(batch[self._features[0]]), len(self._features)), dtype=np.float32)
        for index, name in enumerate(self._features):
            column = batch[name]
            if column.ndim != 1 or column.dtype.kind not in "uifbO":
                raise DataError(f"{file}: column {name!r} holds {_kind_of(column)}, not numbers. Leave it out.")
            try:
                with np.errstate(over="ignore"):  # what is too large for float32 becomes infinity, found below
                    x[:, index] = column.astype(np.float64)
            except (TypeError, ValueError):
                row = next(row for row, cell in enumerate(column) if not _is_number(cell))
                raise _bad_cell(file, first_row + row, name, column[row]) from None
        wrong = np.argwhere(~np.isfinite(x))
        if len(wrong):
            row, index = wrong[0].tolist()
            raise _bad_cell(file, first_row + row, self._features[index], batch[self._features[index]][row])
        return x

    def _read_side_columns(self, options: PackOptions) -> tuple[dict[str, list[str]], Targets, dict[str, int]]:
        """Keys by split, the labels of all splits in one array, and where each split begins in it."""
        keys: dict[str, list[str]] = {split: [] for split in self._files}
        labels: dict[str, list[np.ndarray]] = {name: [] for name in self._labels}
        before, total = {}, 0
        for split, paths in self._files.items():
            before[split] = total
            for path in paths:
                self._require_columns(path)
                for batch in _batches(path):
                    rows = len(batch[self._features[0]])
                    keys[split] += self._keys_of(path, split, batch, len(keys[split]), rows)
                    total += rows
                    for name, parts in labels.items():
                        parts.append(batch[name] if name in batch else np.full(rows, np.nan))
            if not keys[split]:
                raise DataError(f"{listing(paths, 'and')} holds no rows. Add some, or leave the file out.")
        targets = targets_of({name: _joined(parts) for name, parts in labels.items()}, options.task, str(self._place))
        if options.task is not None and targets.task is None:
            raise DataError(f"{self._place} has no labels for --task {options.task}. Name their column with --label.")
        return keys, targets, before

    def _require_columns(self, path: Path) -> None:
        present = _columns_of(path)
        first = self._files["train"][0]
        needed = (*self._features, *([self._key] if self._key else []))
        missing = [name for name in needed if name not in present]
        unknown = [name for name in present if name not in (*needed, *self._labels)]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}, which {first.name} has. Give both the same columns.")
        if unknown:
            raise DataError(f"{path} has the column {unknown[0]!r}, unknown to {first.name}. Give both the same columns.")

    def _keys_of(self, path: Path, split: str, batch: dict[str, np.ndarray], start: int, rows: int) -> list[str]:
        if self._key is None:
            return numbered_keys(split, start, start + rows)
        keys = ["" if cell is None else str(cell) for cell in batch[self._key]]
        if "" in keys or "nan" in keys:
            raise DataError(f"{path}: a cell of the key column {self._key!r} is empty. Give every row a key of its own.")
        return keys


def _by_split(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS and path.is_file():
            for split, pattern in SPLIT_NAMES:
                if pattern.match(path.name):
                    found.setdefault(split, []).append(path)
    return {split: found[split] for split in SPLITS if split in found}


def _batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    from ssl_ae import tables  # here, because pyarrow takes its time and every command imports the sources

    return tables.read_batches(path)


def _columns_of(path: Path) -> tuple[str, ...]:
    batch = next(iter(_batches(path)), None)
    if not batch:
        raise DataError(f"{path} holds no rows. Add some, or leave the file out.")
    if all(_is_number(name) for name in batch):
        raise DataError(f"{path} begins with numbers instead of column names. Put a line of names above them.")
    if "" in batch:
        position = list(batch).index("") + 1
        raise DataError(f"column {position} of {path} has no name. Name it, or leave it out if it is a mere row number.")
    return tuple(batch)


def _label_columns(path: Path, columns: Sequence[str], options: PackOptions) -> tuple[str, ...]:
    if options.label is None:
        return ("label",) if "label" in columns else ()
    if options.label in columns:
        return (options.label,)
    names = tuple(name.strip() for name in options.label.split(","))
    for name in names:
        _require(path, columns, "label", name)
    return names


def _key_column(path: Path, columns: Sequence[str], options: PackOptions) -> str | None:
    if options.key is None:
        return "key" if "key" in columns else None
    _require(path, columns, "key", options.key)
    return options.key


def _require(path: Path, columns: Sequence[str], flag: str, name: str) -> None:
    if name not in columns:
        hint = did_you_mean(name, columns)
        raise DataError(f"{path} has no column {name!r} for --{flag}; it has {listing(columns, 'and')}.{hint}")


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts if len({part.dtype.kind for part in parts}) == 1 else [p.astype(object) for p in parts])


def _is_number(cell: object) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _kind_of(column: np.ndarray) -> str:
    return "lists" if column.ndim > 1 else str(column.dtype)


def _bad_cell(file: Path, row: int, column: str, value: object) -> DataError:
    """`row` counts from 0; the message counts from 1, the first row below the header."""
    shown = "an empty cell" if value is None or value == "" else f"{value}" if _is_number(value) else f"the text {value!r}"
    return DataError(
        f"{file}: row {row + 1}, column {column!r} holds {shown}; a feature is a finite number in every row. "
        "Correct the cell, or drop the row or the column."
    )
