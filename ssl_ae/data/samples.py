"""One sample a member: how the arrays and labels of WebDataset shards made elsewhere are read. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ssl_ae.data.card import X
from ssl_ae.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAYS = ("png", "jpg", "jpeg", "npy")
GREY = ("1", "L", "I", "I;16", "F")  # Pillow's modes of one channel
LABELS = ("cls", "json")
NPY_HEADER_BYTES = 4096  # numpy writes 128; room for others
BLOCK_ROWS = 1024  # rows that a shuffle may treat as lying together


class Member(NamedTuple):
    """A plain file in a tar: where its content lies in the shard, in bytes."""

    name: str
    offset: int
    size: int

    def of(self, data: np.ndarray) -> np.ndarray:
        """(size,) uint8: its bytes in those of the shard."""
        return data[self.offset : self.offset + self.size]


class Samples:
    """The layout of a shard with one file a sample, decoded when it is read."""

    def __init__(self, path: Path, samples: dict[str, dict[str, Member]], data: np.ndarray, x: X | None) -> None:
        self._path = path
        self._keys = list(samples)
        chosen = [array_extension(list(parts), self._place(row)) for row, parts in enumerate(samples.values())]
        self._extensions = [sys.intern(extension) for extension in chosen]
        # offsets and sizes as arrays: a million samples as Python objects would take a gigabyte
        self._spans = _spans([parts[name] for parts, name in zip(samples.values(), chosen, strict=True)])
        self._label_spans = {name: _spans([parts.get(name) for parts in samples.values()]) for name in LABELS}
        self.rows = len(self._keys)
        self.block_starts = np.arange(0, self.rows, BLOCK_ROWS)
        if x is None:
            first = self._decode(data, 0, 3 if self._in_colour(data) else None)
            x = x_of(first.dtype, first.shape, self._place(0))
        self.x = x

    def keys(self, data: np.ndarray) -> list[str]:
        return self._keys

    def labels(self, data: np.ndarray) -> list[Any]:
        found = []
        for row in range(self.rows):
            contents = {name: _of(data, spans[row]).tobytes() for name, spans in self._label_spans.items() if spans[row, 0] >= 0}
            found.append(label(contents.get("cls"), contents.get("json"), self._place(row)))
        return found

    def read(self, data: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        channels = self.x.shape[0] if self.x.kind == "image" else None
        for at, row in enumerate(rows.tolist()):
            sample = self._decode(data, row, channels)
            require(self.x, sample.dtype, sample.shape, self._place(row))
            out[at] = sample

    def _in_colour(self, data: np.ndarray) -> bool:
        """Whether any image is in colour: a set of photographs may well begin with a grey one."""
        images = (row for row, extension in enumerate(self._extensions) if not extension.endswith("npy"))
        return any(not grey(_of(data, self._spans[row]), self._place(row)) for row in images)

    def _decode(self, data: np.ndarray, row: int, channels: int | None) -> np.ndarray:
        return decode(_of(data, self._spans[row]), self._extensions[row], self._place(row), channels)

    def _place(self, row: int) -> str:
        return f"{self._path}: sample {self._keys[row]}"


def split_name(member: str) -> tuple[str, str]:
    """`a/b.x.npy` -> (`a/b`, `x.npy`): WebDataset's key ends at the first dot of the last part of the path."""
    folder, slash, file = member.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def array_extension(extensions: list[str], place: str) -> str:
    """Which of a sample's members is x: the only image or array among them. Raises DataError unless there is one."""
    found = [extension for extension in extensions if extension.rpartition(".")[2] in ARRAYS]
    if len(found) != 1:
        has = " and ".join(f".{extension}" for extension in found or extensions)
        raise DataError(f"{place} has {has}: expected exactly one of {', '.join(f'.{name}' for name in ARRAYS)}.")
    return found[0]


def decode(data: np.ndarray, extension: str, place: str, channels: int | None = None) -> np.ndarray:
    """Image -> (C, H, W) uint8, one channel for greys and three for anything else; .npy -> uint8 or float32.

    An array (H, W) of uint8 is an image of one channel; other floating types become float32. Where a set has `channels`
    = 3, grey images are spread over them. Raises DataError.
    """
    if extension.endswith("npy"):
        return _array(data, place)
    with _image(data, place) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{place} has more than 8 bits a channel, which would be lost. Store it as .npy of float32.")
        alone = image.mode in GREY and channels != 3
        pixels = np.asarray(image.convert("L" if alone else "RGB"))  # (H, W) or (H, W, 3)
    return pixels[None] if alone else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def grey(data: np.ndarray, place: str) -> bool:
    """Whether an encoded image has one channel, from its header. Raises DataError."""
    with _image(data, place) as image:
        return image.mode in GREY


def x_of(dtype: np.dtype, shape: tuple[int, ...], place: str) -> X:
    """What a first sample says about its set; the range of floats stays open until somebody has looked at them all."""
    kinds = {1: "vector", 2: "signal", 3: "image"}
    if len(shape) not in kinds or (len(shape) == 3 and shape[0] > 4):
        raise DataError(
            f"{place} has shape {shape}: expected (D,) for vectors, (C, T) for signals or (C, H, W) with at most 4 "
            "channels for images."
        )
    limits = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
    return X(kind=kinds[len(shape)], dtype=dtype.name, shape=shape, range=limits)


def require(x: X, dtype: np.dtype, shape: tuple[int, ...], place: str) -> None:
    """Raise DataError unless a sample is what the data set's samples are."""
    if dtype != x.dtype or shape != x.shape:
        raise DataError(
            f"{place} is {dtype} {shape}, but the data set holds {x.dtype} {x.shape}. "
            "All samples must be alike: `ssl-ae data pack` resizes images with --size."
        )


def label(cls: bytes | None, sidecar: bytes | None, place: str) -> Any:
    """The content of `.cls`, else `label` in the `.json`: a number, a name, a list of numbers; None without either."""
    if cls is not None:
        text = cls.decode("utf-8", "replace").strip()
        return int(text) if text.removeprefix("-").isdecimal() else text or None
    if sidecar is None:
        return None
    try:
        content = json.loads(sidecar)
    except ValueError as error:
        raise DataError(f"{place}: the .json member is damaged: {error}. Fetch the shard again.") from error
    found = content.get("label") if isinstance(content, dict) else None
    numbers = isinstance(found, list) and all(isinstance(item, int | float) for item in found)
    if found is None or isinstance(found, int | float | str) or numbers:
        return found
    raise DataError(f"{place}: label = {found!r} in the .json member: expected a number, a name or a list of numbers.")


def _spans(members: list[Member | None]) -> np.ndarray:
    """(n, 2) int64: offset and size, -1 where there is no member."""
    spans = [(-1, -1) if member is None else member[1:] for member in members]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _of(data: np.ndarray, span: np.ndarray) -> np.ndarray:
    offset, size = span.tolist()
    return data[offset : offset + size]


def stored_array(content: np.ndarray, place: str) -> np.ndarray:
    """A view of the array in the bytes of an .npy file, (size,) uint8. Raises DataError; never unpickles."""
    header = io.BytesIO(content[:NPY_HEADER_BYTES].tobytes())
    try:
        version = np.lib.format.read_magic(header)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(header)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{place}: the .npy member is damaged: {reason}. Make or fetch the shard again.") from error
    stated = header.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise DataError(f"{place} holds Python objects, which are never unpickled: expected uint8 or floats.")
    if min(shape, default=0) < 1 or stated != len(content):
        raise DataError(
            f"{place}: the .npy member of {len(content):,} bytes says it is {dtype} {shape}. Make or fetch the shard again."
        )
    return np.ndarray(shape, dtype, buffer=content, offset=header.tell(), order="F" if fortran else "C")


def _array(data: np.ndarray, place: str) -> np.ndarray:
    array = stored_array(data, place)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        raise DataError(f"{place} holds {array.dtype.name}: expected uint8 or floats.")
    return np.ascontiguousarray(array[None] if array.dtype == np.uint8 and array.ndim == 2 else array)


@contextlib.contextmanager
def _image(data: np.ndarray, place: str) -> Iterator[Image]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=("PNG", "JPEG")) as image:
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: the image is damaged: {error}. Fetch the shard again.") from error
