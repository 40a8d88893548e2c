"""What a label column says under a given meaning: class names or indices, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_ae.data.card import Y
from ssl_ae.data.sources.targets import NO_LABEL, UNLABELED, targets_of
from ssl_ae.errors import DataError, did_you_mean, listing

NAMES_SHOWN = 12  # an error about a set of 1,000 classes does not list them all

Column = np.ndarray  # (n,) text as objects (None where null), integers (masked where null) or floats; or (n, T) floats


def read_labels(place: str | Path, column: Column, y: Y | None, indices: bool = False) -> tuple[Y, np.ndarray]:
    """What labels mean, and the labels: (n,) int64 class indices, -1 where unknown, or (n, T) float32 with NaN there.

    Where `y` is None the values say what they mean (`targets_of`). `indices`: the labels of classes are known to be
    indices, whatever the classes are called. Raises DataError for a value that `y` does not allow.
    """
    if y is None:
        return _self_explained(place, column)
    if y.task == "classes":
        return y, _class_indices(place, column, y.names, indices)
    values = _targets(place, column, y.names)
    wrong = ~(np.isnan(values) | np.isin(values, (0, 1))) if y.task == "multilabel" else np.isinf(values)
    if wrong.any():
        row, target = np.argwhere(wrong)[0]
        expected = "0 or 1" if y.task == "multilabel" else "a finite number"
        raise DataError(f"{place}: row {row + 1}: label {y.names[target]!r} = {values[row, target]:g}: expected {expected}.")
    return y, values


def read_numbers(place: str | Path, name: str, column: Column) -> np.ndarray:
    """(n,) float32; NaN where a cell is empty. Raises DataError for text that is no number."""
    if column.dtype != object:
        return np.ma.filled(column.astype(np.float32), np.nan)
    found = np.full(len(column), np.nan, dtype=np.float32)
    for row, text in enumerate(as_text(column)):
        if text.lower() in NO_LABEL:
            continue
        try:
            found[row] = float(text)
        except ValueError:
            raise DataError(f"{place}: row {row + 1}: {name} = {text!r}: expected a number.") from None
    return found


def as_text(column: Column) -> list[str]:
    """The cells as text without surrounding blanks: whole floats as integers, empty and null cells as ""."""
    if column.dtype.kind == "f":
        return ["" if cell != cell else f"{cell:.0f}" if cell % 1 == 0 else str(cell) for cell in column.tolist()]
    cells = column.tolist()  # None under a mask
    try:
        return list(map(str.strip, cells))
    except TypeError:  # not all are text
        return ["" if cell is None else str(cell).strip() for cell in cells]


def _self_explained(place: str | Path, column: Column) -> tuple[Y, np.ndarray]:
    if isinstance(column, np.ma.MaskedArray):
        column = column.astype(np.float64).filled(np.nan)
    several = {f"label_{index}": target for index, target in enumerate(column.T)} if column.ndim == 2 else None
    found = targets_of(several or {"label": column}, None, str(place))
    if found.task is None:
        raise DataError(f"{place}: no row has a label.")
    return Y(task=found.task, names=found.names), found.values


def _class_indices(place: str | Path, column: Column, names: Sequence[str], indices: bool) -> np.ndarray:
    if column.ndim == 2:
        raise DataError(f"{place}: a label is {column.shape[1]} numbers: expected one class a row.")
    if indices and column.dtype.kind == "i":  # the labels that we wrote ourselves
        column = np.ma.filled(column, UNLABELED)
    else:
        column = np.array(as_text(column), dtype=np.str_)
    distinct, group = np.unique(column, return_inverse=True)
    distinct = as_text(distinct)
    unknown = {text: UNLABELED for text in distinct if text.lower() in NO_LABEL} | {str(UNLABELED): UNLABELED}
    by_name = unknown | {name: index for index, name in enumerate(names)}
    by_index = unknown | {str(index): index for index in range(len(names))}
    # the whole column is one or the other: classes called "1", "2", "3" must not be mixed up with indices
    meaning = by_index if indices or any(text not in by_name for text in distinct) else by_name
    if any(text not in meaning for text in distinct):
        stranger = next(text for text in distinct if text not in (by_index if indices else by_name))
        row = int(np.flatnonzero(group == distinct.index(stranger))[0])
        shown = [*names[:NAMES_SHOWN], f"{len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else names
        raise DataError(
            f"{place}: row {row + 1}: label {stranger!r} is not a class of this data set: expected {listing(shown)} "
            f"(or, in every row, its index from 0).{did_you_mean(stranger, names)}"
        )
    return np.array([meaning[text] for text in distinct], dtype=np.int64)[group]


def _targets(place: str | Path, column: Column, names: Sequence[str]) -> np.ndarray:
    """(n, T) float32. Text of several targets is T numbers separated by blanks."""
    width = len(names)
    if column.ndim == 2:
        widths, values = np.full(len(column), column.shape[1]), column.astype(np.float32)
    elif width > 1 and column.dtype == object:
        cells = [text.split() or ["nan"] * width for text in as_text(column)]
        widths = np.array([len(cell) for cell in cells])
        values = None
    else:
        widths, values = np.ones(len(column), dtype=int), read_numbers(place, "label", column)[:, None]
    if (widths != width).any():
        row = int((widths != width).argmax())
        wanted = listing([*names[:NAMES_SHOWN], "..."] if width > NAMES_SHOWN else names, "and")
        raise DataError(f"{place}: row {row + 1}: the label is {widths[row]} numbers: expected {width}, for {wanted}.")
    if values is None:
        by_target = [np.array(target, dtype=object) for target in zip(*cells, strict=True)]
        values = np.stack([read_numbers(place, name, t) for name, t in zip(names, by_target, strict=True)], axis=1)
    return values
