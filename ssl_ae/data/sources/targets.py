"""What columns of labels mean: classes, numbers to predict, or several yes-or-no answers a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ssl_ae.data.card import Task
from ssl_ae.errors import DataError, listing

UNLABELED = -1
NO_LABEL = frozenset({"", "nan", "na", "n/a", "null"})  # what a text cell of a row without a label holds, in any case
OF_PREDICTIONS = frozenset({"key", "reconstruction_nats"})  # columns of a table of predictions that are no target's
MANY = 100  # more values than this, and hardly a row that shares one, are no obvious classes


@dataclass(frozen=True)
class Targets:
    """Labels as a card and a label table hold them."""

    task: Task | None = None  # None when no row has a label
    names: tuple[str, ...] = ()
    values: np.ndarray | None = None  # (n,) int64 class index or -1 | (n, T) float32, NaN where unknown | None


def targets_of(columns: Mapping[str, np.ndarray], task: Task | None, place: str) -> Targets:
    """Read label columns, each (n,) of numbers or text, as `task`, or as the task their values suggest.

    One column of text or whole numbers holds classes; an empty cell, NaN or -1 stands for "no label". One column with
    fractions, and several columns, are targets of a regression, except that several with nothing but 0 and 1 are
    multilabel. Class names are sorted: numbers by value, text by its letters.
    Raises DataError, beginning with `place`, when the values cannot be of the task or leave open which it is.
    """
    if not any(_known(column).any() for column in columns.values()):
        return Targets()
    if len(columns) == 1:
        [(name, column)] = columns.items()
        where = f"{place}: label column {name!r}"
        if task == "classes" or (task is None and _looks_like_classes(column, where)):
            return _classes(column, where)
    elif task == "classes":
        raise DataError(
            f"{place}: classes need one label column, not {len(columns)}. "
            "Give one column of class names or numbers, or say --task multilabel."
        )
    return _numbers(columns, task, place)


def _classes(column: np.ndarray, where: str) -> Targets:
    known = _known(column)
    numbers = _as_numbers(column)
    if numbers is None:
        text = np.array([str(cell).strip() for cell in column])
        known &= text != str(UNLABELED)
        found, index = np.unique(text[known], return_inverse=True)
        names = tuple(str(name) for name in found)
    else:
        if not _whole(numbers[known]):
            raise DataError(f"{where} holds fractions such as {_fraction(numbers[known])}. Say --task regression.")
        if set(numbers[known]) == {-1.0, 1.0}:
            raise DataError(f"{where} holds only -1 and 1, and -1 means unlabelled. Write the two classes as 0 and 1.")
        known &= numbers != UNLABELED
        found, index = np.unique(numbers[known], return_inverse=True)
        names = _spellings(column[known], found, where) if column.dtype.kind in "OU" else tuple(str(int(n)) for n in found)
    if not names:
        return Targets()
    values = np.full(len(column), UNLABELED, dtype=np.int64)
    values[known] = index
    return Targets("classes", names, values)


def _spellings(cells: np.ndarray, numbers: np.ndarray, where: str) -> tuple[str, ...]:
    """How a text column writes each of these whole numbers, 7.0 as 7: 007 is a name of its own.

    Raises DataError where one number is written in two ways, which may well be two classes.
    """
    written: dict[float, str] = {}
    for cell in cells:
        text = re.sub(r"\.0*$", "", str(cell).strip())
        known = written.setdefault(float(text), text)
        if known != text:
            raise DataError(f"{where}: {known!r} and {text!r} are one number, written in two ways. Write each class in one.")
    return tuple(written[number] for number in numbers)


def _numbers(columns: Mapping[str, np.ndarray], task: Task | None, place: str) -> Targets:
    read = {name: _as_numbers(column) for name, column in columns.items()}
    for name, numbers in read.items():
        if numbers is None:
            cell = _first_text(columns[name])
            raise DataError(
                f"{place}: label column {name!r} holds the text {cell!r}, but {task or 'several label columns'} "
                "needs numbers. Correct the cell, or say --task classes with one column."
            )
    values = np.stack(list(read.values()), axis=1).astype(np.float32)  # (n, T)
    known = values[~np.isnan(values)]
    if not np.isfinite(known).all():
        raise DataError(f"{place}: {listing(columns, 'and')} holds infinity or a number too large for float32.")
    answers = bool(np.isin(known, (0, 1)).all())
    if task == "multilabel" and not answers:
        odd = known[~np.isin(known, (0, 1))][0]
        raise DataError(f"{place}: multilabel columns hold only 0 and 1, but here is {odd:g}. Say --task regression.")
    if task is None and answers and (values.sum(axis=1) == 1).all():
        raise DataError(
            f"{place}: every row of the {len(read)} label columns holds exactly one 1, as one-hot classes do. "
            "Give one column of class numbers instead, or say --task multilabel."
        )
    chosen = task or ("multilabel" if answers and len(read) > 1 else "regression")
    if chosen == "regression" and (taken := OF_PREDICTIONS & read.keys()):
        raise DataError(
            f"{place}: label column {min(taken)!r}: a table of predictions has a column of that name beside the targets' own. "
            "Rename it."
        )
    return Targets(chosen, tuple(read), values)


def _looks_like_classes(column: np.ndarray, where: str) -> bool:
    known = column[_known(column)]
    numbers = _as_numbers(known)
    if numbers is not None and not _whole(numbers):
        return False
    different = len(np.unique(known.astype(str) if numbers is None else numbers))
    if different > max(MANY, len(known) / 10):
        raise DataError(
            f"{where} holds {different} different values in {len(known)} rows, more than classes usually have. "
            "Say --task classes if they are, --task regression if they are amounts, or name another --label."
        )
    return True


def _known(column: np.ndarray) -> np.ndarray:
    """(n,) bool: rows with a label."""
    if column.dtype.kind in "OU":
        return np.array([not _is_missing(cell) for cell in column], dtype=bool)
    return ~np.isnan(column) if column.dtype.kind == "f" else np.ones(len(column), dtype=bool)


def _is_missing(cell: object) -> bool:
    return cell is None or str(cell).strip().lower() in NO_LABEL


def _as_numbers(column: np.ndarray) -> np.ndarray | None:
    """(n,) float64, NaN where there is no label; None when a label is not a number."""
    if column.dtype.kind not in "OU":
        return column.astype(np.float64)
    try:
        if any("_" in str(cell) for cell in column):  # Python takes 1_1 for 11
            return None
        return np.array([np.nan if _is_missing(cell) else float(cell) for cell in column], dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _first_text(column: np.ndarray) -> str:
    return next(str(cell) for cell in column if not _is_missing(cell) and _as_numbers(np.array([str(cell)])) is None)


def _whole(numbers: np.ndarray) -> bool:
    return bool((np.isfinite(numbers) & (numbers == np.floor(numbers))).all())


def _fraction(numbers: np.ndarray) -> str:
    return f"{numbers[numbers != np.floor(numbers)][0]:g}"
