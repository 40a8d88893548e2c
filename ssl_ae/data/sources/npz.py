"""NumPy archives: arrays of images or vectors, with or without labels."""

from __future__ import annotations

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_ae.data.card import SPLITS, X
from ssl_ae.data.keys import NumberedKeys
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
from ssl_ae.errors import DataError, listing

CHANNELS = (1, 3)
BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)  # the last two: unknown methods, passwords
BAD_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)  # it is parsed as Python
MOST_FROM_A_BYTE = 1032  # what deflate can make of one, as zlib's authors say


class Npz(Source):
    """An `.npz` with `x_train`, `y_train`, `x_val`, `y_val`, `x_test`, `y_test`; only `x_train` is needed.

    `x` and `y` (or `X` and `y`) are a train split alone; MedMNIST's `train_images`, `train_labels`, ... are known too.
    An x is (n, D) vectors, (n, H, W) grey images, or (n, H, W, C) or (n, C, H, W) images with C 1 or 3; where both
    could be, channels are last. uint8 stays uint8, every other number becomes float32. A y is (n,) or (n, 1) class
    numbers, class names or amounts, or (n, T) targets; -1 and NaN stand for "no label". Keys are `train-00000000`, ...
    Arrays are read a block at a time, and arrays of Python objects are refused: they would have to be unpickled.
    """

    name = "npz"
    summary = "an .npz file with x_train, y_train, x_test, y_test, or x, y"

    @classmethod
    def recognises(cls, place: str) -> bool:
        return path_of(place).suffix.lower() == ".npz" and path_of(place).is_file()

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name, "task")
        self._path = path_of(place)
        with _readable(self._path), zipfile.ZipFile(self._path) as archive:
            stored = [entry.removesuffix(".npy") for entry in archive.namelist()]
        self._arrays = {split: names for split in SPLITS if (names := _names_of(split, stored))}
        if "train" not in self._arrays:
            raise DataError(
                f"{self._path} holds the arrays {listing(stored, 'and')}; "
                "x_train or x is needed, with y_train or y for labels. Save it with those names."
            )
        self._headers = {split: _header_of(self._path, x) for split, (x, _) in self._arrays.items()}
        layouts = {split: _layout_of(self._path, header) for split, header in self._headers.items()}
        self._x, self._channels_last = layouts["train"]
        for split, (x, channels_last) in layouts.items():
            if (x, channels_last) != layouts["train"]:
                raise DataError(
                    f"{self._path}: samples of {self._headers[split].name} are {x.dtype} {x.shape}, but those of "
                    f"{self._headers['train'].name} {self._x.dtype} {self._x.shape}. Save them alike."
                )
        self._targets, self._rows_before = self._read_targets(options)

    def describe(self) -> Description:
        return Description(name_of(str(self._path)), self._x, self._targets.task, self._targets.names, tuple(self._arrays))

    def keys(self, split: str) -> Sequence[str]:
        return NumberedKeys(split, self._headers[split].rows)

    def blocks(self, split: str) -> Iterator[Block]:
        header, before, labels = self._headers[split], self._rows_before[split], self._targets.values
        start = 0
        for stored in _batches(self._path, header, rows_a_block(self._x)):
            x = np.moveaxis(stored, -1, 1) if self._channels_last else stored
            with np.errstate(over="ignore"):  # a number too large for float32 becomes infinity, which is refused here
                x = np.ascontiguousarray(x, dtype=self._x.dtype).reshape(len(x), *self._x.shape)
            if not np.isfinite(x).all():
                row = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
                raise DataError(
                    f"{self._path}: {header.name}[{start + row}] holds NaN, infinity or a number beyond float32. "
                    "Fill it in or leave the sample out."
                )
            stop = start + len(x)
            mine = None if labels is None else labels[before + start : before + stop]
            yield Block(numbered_keys(split, start, stop), x, mine)
            start = stop

    def _read_targets(self, options: PackOptions) -> tuple[Targets, dict[str, int]]:
        """The labels of all splits in one array, and where each split begins in it."""
        parts, before, rows = [], {}, 0
        for split, (_, name) in self._arrays.items():
            before[split] = rows
            rows += self._headers[split].rows
            if name is not None:
                parts.append((split, _read_labels(self._path, name, self._headers[split])))
        if not parts:
            if options.task is not None:
                raise DataError(f"{self._path} has no labels, so --task {options.task} has no meaning. Leave it out.")
            return Targets(), before
        widths = {labels.shape[1] for _, labels in parts}
        kinds = {labels.dtype.kind in "OU" for _, labels in parts}
        if len(widths) > 1 or len(kinds) > 1:
            raise DataError(f"{self._path}: the labels of its splits differ in shape or kind. Save them alike.")
        (width,), (text,) = widths, kinds
        joined = np.full((rows, width), None if text else np.nan, dtype=object if text else np.float64)
        for split, labels in parts:
            joined[before[split] : before[split] + len(labels)] = labels
        columns = {"y" if width == 1 else f"y{index}": joined[:, index] for index in range(width)}
        return targets_of(columns, options.task, str(self._path)), before


@dataclass(frozen=True)
class _Header:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def rows(self) -> int:
        return self.shape[0]


def _names_of(split: str, stored: Sequence[str]) -> tuple[str, str | None] | None:
    """The names of a split's arrays of samples and of labels among those stored."""
    choices = [(f"x_{split}", f"y_{split}"), (f"X_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")]
    if split == "train":
        choices += [("x", "y"), ("X", "y")]
    for x, y in choices:
        if x in stored:
            return x, y if y in stored else None
    return None


def _header_of(path: Path, name: str) -> _Header:
    with _member(path, name) as file:
        return _read_header(path, name, file)


def _read_header(path: Path, name: str, file: BinaryIO) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which are never unpickled. Save it as numbers or text.")
    if not shape or 0 in shape:
        raise DataError(f"{path}: {name} of shape {shape} holds no samples.")
    stated, stored = file.tell() + math.prod(shape) * dtype.itemsize, _stored_bytes(path, name)
    if min(shape) < 0 or stated != stored:
        raise DataError(
            f"{path}: {name} says that it is {dtype} {shape}, which its {stored:,} bytes are not. Save the file again."
        )
    return _Header(name, shape, dtype, fortran)


def _stored_bytes(path: Path, name: str) -> int:
    """How long a member is once it is unpacked. Raises DataError where so much cannot come out of the file."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
    if entry.compress_size > path.stat().st_size or entry.file_size > MOST_FROM_A_BYTE * (entry.compress_size + 1):
        raise DataError(f"{path}: {name} is said to have {entry.file_size:,} bytes, more than can be in it. Save the file again.")
    return entry.file_size


def _layout_of(path: Path, header: _Header) -> tuple[X, bool]:
    """What a sample is, and whether its channels are stored last."""
    if header.dtype.kind not in "uifb":
        raise DataError(f"{path}: {header.name} holds {header.dtype}, not real numbers. Save it as uint8 or float32.")
    dtype = "uint8" if header.dtype == np.uint8 else "float32"
    value_range = (0, 255) if dtype == "uint8" else TO_BE_MEASURED
    sample = header.shape[1:]
    if len(sample) == 1:
        return X(kind="vector", dtype=dtype, shape=sample, range=value_range), False
    if len(sample) == 2:
        return X(kind="image", dtype=dtype, shape=(1, *sample), range=value_range), False
    if len(sample) == 3 and sample[2] in CHANNELS:
        return X(kind="image", dtype=dtype, shape=(sample[2], *sample[:2]), range=value_range), True
    if len(sample) == 3 and sample[0] in CHANNELS:
        return X(kind="image", dtype=dtype, shape=sample, range=value_range), False
    raise DataError(
        f"{path}: {header.name} has the shape {header.shape}; expected (n, D), (n, H, W), (n, H, W, C) or (n, C, H, W) "
        "with 1 or 3 channels C. Reshape it."
    )


def _read_labels(path: Path, name: str, samples: _Header) -> np.ndarray:
    """(n, T) float64 or text."""
    with _member(path, name) as file:
        header = _read_header(path, name, file)
        if header.rows != samples.rows:
            raise DataError(f"{path}: {name} holds {header.rows} labels for {samples.rows} samples of {samples.name}.")
    labels = np.concatenate(list(_batches(path, header, header.rows)))
    if labels.dtype.kind not in "uifbU" or labels.ndim > 2:
        raise DataError(f"{path}: {name} is {labels.dtype} of shape {header.shape}; expected numbers or text, (n,) or (n, T).")
    labels = labels.reshape(len(labels), -1)
    return labels if labels.dtype.kind == "U" else labels.astype(np.float64)


def _batches(path: Path, header: _Header, rows: int) -> Iterator[np.ndarray]:
    with _member(path, header.name) as file:
        if header.fortran:  # a row lies scattered over the whole array, so there is no reading it in pieces
            whole = np.lib.format.read_array(file, allow_pickle=False)
            yield from (whole[start : start + rows] for start in range(0, header.rows, rows))
            return
        _read_header(path, header.name, file)
        row_bytes = header.dtype.itemsize * int(np.prod(header.shape[1:], dtype=np.int64))
        for start in range(0, header.rows, rows):
            count = min(rows, header.rows - start)
            content = file.read(count * row_bytes)
            if len(content) != count * row_bytes:
                raise DataError(f"{path}: {header.name} is truncated. Save the file again.")
            yield np.frombuffer(content, dtype=header.dtype).reshape(count, *header.shape[1:])


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[BinaryIO]:
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        yield file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (*BAD_ZIP, *BAD_HEADER) as error:
        raise DataError(f"{path} is no readable .npz: {error}. Save the file again.") from error
