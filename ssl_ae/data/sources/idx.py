"""IDX files: the format of MNIST (described at yann.lecun.com/exdb/mnist), Fashion-MNIST and KMNIST."""

from __future__ import annotations

import contextlib
import gzip
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_ae.data.card import X
from ssl_ae.data.keys import NumberedKeys
from ssl_ae.data.sources import Block, Description, PackOptions, Source, name_of, numbered_keys, path_of, rows_a_block
from ssl_ae.errors import DataError

PREFIXES = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 0x08


class Idx(Source):
    """A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, for a test split, two `t10k-...` files.

    Each may be plain or `.gz`, and written `.idx3-ubyte` instead of `-idx3-ubyte`. A split without a label file is
    unlabelled. Classes are called by their numbers, "0" to the largest. Keys are `train-00000000` and so on.
    """

    name = "idx"
    summary = "a folder with MNIST's four IDX files, plain or .gz"

    @classmethod
    def recognises(cls, place: str) -> bool:
        return any(_find(path_of(place), prefix, "images", 3) for prefix in PREFIXES.values())

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name)
        folder = path_of(place)
        self._name = name_of(place)
        self._images = {split: path for split, prefix in PREFIXES.items() if (path := _find(folder, prefix, "images", 3))}
        if "train" not in self._images:
            raise DataError(f"{folder} holds {self._images['test'].name} but no train-images-idx3-ubyte. Add it.")
        self._shapes = {split: _read_shape(path, 3) for split, path in self._images.items()}
        self._labels = {split: self._read_labels(folder, split) for split in self._images}
        _, height, width = self._shapes["train"]
        for split, (_, *size) in self._shapes.items():
            if size != [height, width]:
                raise DataError(
                    f"{self._images[split]} holds images of {size[0]}x{size[1]}, but train {height}x{width}. Pack them apart."
                )
        self._x = X(kind="image", dtype="uint8", shape=(1, height, width), range=(0, 255))

    def describe(self) -> Description:
        largest = max((int(labels.max()) for labels in self._labels.values() if labels is not None), default=-1)
        names = tuple(str(index) for index in range(largest + 1))
        return Description(self._name, self._x, "classes" if names else None, names, tuple(self._images))

    def keys(self, split: str) -> Sequence[str]:
        return NumberedKeys(split, self._shapes[split][0])

    def blocks(self, split: str) -> Iterator[Block]:
        path, rows, labels = self._images[split], self._shapes[split][0], self._labels[split]
        step = rows_a_block(self._x)
        with _opened(path) as file:
            _header(path, file, 3)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                content = _exactly(path, file, (stop - start) * self._x.size)
                x = np.frombuffer(content, dtype=np.uint8).reshape(stop - start, *self._x.shape)
                yield Block(numbered_keys(split, start, stop), x, None if labels is None else labels[start:stop].astype(np.int64))
            _nothing_more(path, file)

    def _read_labels(self, folder: Path, split: str) -> np.ndarray | None:
        path = _find(folder, PREFIXES[split], "labels", 1)
        if path is None:
            return None
        rows = self._shapes[split][0]
        with _opened(path) as file:
            (count,) = _header(path, file, 1)
            if count != rows:
                raise DataError(f"{path} holds {count} labels, but {self._images[split].name} {rows} images. Fetch both again.")
            content = _exactly(path, file, rows)
            _nothing_more(path, file)
        return np.frombuffer(content, dtype=np.uint8)


def _find(folder: Path, prefix: str, what: str, dimensions: int) -> Path | None:
    for joint in "-.":
        for ending in ("", ".gz"):
            path = folder / f"{prefix}-{what}{joint}idx{dimensions}-ubyte{ending}"
            if path.is_file():
                return path
    return None


def _read_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    with _opened(path) as file:
        return _header(path, file, dimensions)


def _header(path: Path, file: BinaryIO, dimensions: int) -> tuple[int, ...]:
    """The lengths of an IDX array of bytes: two zeros, the type, the number of dimensions, big-endian lengths."""
    magic = _exactly(path, file, 4)
    if magic != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
        raise DataError(
            f"{path} begins with {magic.hex(' ')}, not 00 00 08 {dimensions:02x}: "
            f"it is no IDX file of bytes in {dimensions} dimensions. Fetch it again."
        )
    lengths = struct.unpack(f">{dimensions}I", _exactly(path, file, 4 * dimensions))
    if 0 in lengths:
        raise DataError(f"{path} is empty: its header says {' x '.join(map(str, lengths))}. Fetch it again.")
    return lengths


def _exactly(path: Path, file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise DataError(f"{path} is truncated: {size - len(content)} bytes are missing. Fetch it again.")
    return content


def _nothing_more(path: Path, file: BinaryIO) -> None:
    if file.read(1):
        raise DataError(f"{path} is longer than its header says. Fetch it again.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. Fetch it again.") from error
