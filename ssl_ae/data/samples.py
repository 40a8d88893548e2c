"""One sample a member: how the arrays and labels of WebDataset shards made elsewhere are read. Nothing is unpickled."""

from __future__ import annotations

import io
import json
import math
import tokenize
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_ae.data import tar
from ssl_ae.data.card import X
from ssl_ae.data.keys import as_keys
from ssl_ae.data.tar import Member
from ssl_ae.errors import DataError

ARRAYS = ("png", "jpg", "jpeg", "npy")
FORMATS = ("PNG", "JPEG")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError)  # what Pillow says of damage, beside what it says of bombs
GREY = ("1", "L", "I", "I;16", "F")  # Pillow's modes of one channel
LABELS = ("cls", "json")
NPY_HEADER_BYTES = 4096  # numpy writes 128; room for others
NPY_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)  # of a header: it is parsed
DIGITS = 19  # of an int64 with its sign
BLOCK_ROWS = 1024  # rows that a shuffle may treat as lying together


class Samples:
    """The layout of a shard with one file a sample, decoded when it is read. About 50 bytes a sample."""

    def __init__(self, path: Path, members: Iterable[Member], data: np.ndarray, x: X | None, tolerant: bool = False) -> None:
        """`tolerant` leaves what is wrong with single samples to `damage`."""
        self._path = path
        self._bad: dict[int, str] = {}
        index = _Index()
        for member in members:
            if not index.add(member):
                key = split_name(member.name)[0]
                if not tolerant:
                    raise DataError(_refused(path, data, key))
                self._bad[index.row_of[key]] = f"{path}: sample {key} has two members of one kind."
        self.rows = len(index.row_of)
        if not self.rows:
            raise DataError(f"{path} holds no samples. Remove it, or pack the source again.")
        self._keys = as_keys(index.row_of)
        self._spans, self._label_spans = (np.array(spans).reshape(-1, 2) for spans in (index.spans, index.label_spans))
        self._arrays, self._cls = (np.array(flags, dtype=bool) for flags in (index.arrays, index.cls))
        absent = np.flatnonzero((self._spans < 0).any(axis=1))
        if len(absent) and not tolerant:
            raise DataError(_refused(path, data, self._keys[int(absent[0])]))
        self._bad |= {row: f"{self._place(row)} has neither an image nor an array." for row in absent.tolist()}
        self.block_starts = np.arange(0, self.rows, BLOCK_ROWS)
        self.x = x or self._first(data, tolerant)

    def keys(self, data: np.ndarray) -> list[str]:
        return self._keys.tolist()

    def labels(self, data: np.ndarray, rows: Sequence[int]) -> list[Any]:
        return [self._label(data, row) for row in rows]

    def damage(self, data: np.ndarray) -> dict[int, str]:
        found = dict(self._bad)
        for row in range(self.rows):
            if row in found:
                continue
            try:
                if not np.isfinite(self._sample(data, row)).all():
                    raise DataError(not_finite(self._place(row)))
                self._label(data, row)
            except DataError as error:
                found[row] = str(error)
        return found

    def read(self, data: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        for at, row in enumerate(rows.tolist()):
            out[at] = self._sample(data, row)

    def _sample(self, data: np.ndarray, row: int) -> np.ndarray:
        sample = self._decode(data, row, self.x.shape[0] if self.x.kind == "image" else None, self.x)
        if sample.dtype != self.x.dtype or sample.shape != self.x.shape:
            require(self.x, sample.dtype, sample.shape, self._place(row))
        return sample

    def _label(self, data: np.ndarray, row: int) -> Any:
        offset, size = self._label_spans[row].tolist()
        content = data[offset : offset + size].tobytes() if offset >= 0 else None
        return label(content, None, self._place(row)) if self._cls[row] else label(None, content, self._place(row))

    def _first(self, data: np.ndarray, tolerant: bool) -> X:
        """What the first sample is; where `tolerant`, the first that can be read."""
        colour, first = self._in_colour(data, tolerant), DataError(f"{self._path} holds no sample that can be read.")
        for row in (row for row in range(self.rows) if row not in self._bad):
            try:
                sample = self._decode(data, row, 3 if colour else None)
                return x_of(sample.dtype, sample.shape, self._place(row))
            except DataError as error:
                if not tolerant:
                    raise
                first = error
        raise first

    def _in_colour(self, data: np.ndarray, tolerant: bool) -> bool:
        """Whether any image is in colour: a set of photographs may well begin with a grey one."""
        for row in np.flatnonzero(~self._arrays & (self._spans >= 0).all(axis=1)):
            try:
                if not grey(_of(data, self._spans[row]), self._place(row)):
                    return True
            except DataError:
                if not tolerant:
                    raise
        return False

    def _decode(self, data: np.ndarray, row: int, channels: int | None, x: X | None = None) -> np.ndarray:
        return decode(_of(data, self._spans[row]), self._arrays[row], self._place(row), channels, x)

    def _place(self, row: int) -> Place:
        return Place(self._path, self._keys, row)


class Place(NamedTuple):
    """Where a sample lies, told only where something is wrong with it."""

    path: Path
    keys: np.ndarray
    row: int

    def __str__(self) -> str:
        return f"{self.path}: sample {self.keys[self.row]}"


class _Index:
    """Where each sample of a shard has its array and its label; offsets and sizes in turn, -1 where there is none.

    The members of a sample need not lie together: a tar that was made without sorting holds them in any order.
    """

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.spans, self.label_spans = array("q"), array("q")
        self.arrays, self.cls = bytearray(), bytearray()  # whether x is an array, not an image; whether the label is a .cls

    def add(self, member: Member) -> bool:
        """Take a member in; False where its sample has such a one already."""
        key, extension = split_name(member.name)
        if not key or key.endswith("/"):
            return True  # `.DS_Store` and its like
        row = self.row_of.setdefault(key, len(self.row_of))
        if row == len(self.arrays):
            self.spans.extend((-1, -1))
            self.label_spans.extend((-1, -1))
            self.arrays.append(False)
            self.cls.append(False)
        kind = extension.rpartition(".")[2]
        if kind in ARRAYS:
            fresh = self.spans[2 * row] < 0
            self.spans[2 * row], self.spans[2 * row + 1] = member.offset, member.size
            self.arrays[row] = kind == "npy"
            return fresh
        if extension in LABELS and not (self.cls[row] and extension == "json"):  # the .cls speaks where there are both
            fresh = self.label_spans[2 * row] < 0 or (extension == "cls" and not self.cls[row])
            self.label_spans[2 * row], self.label_spans[2 * row + 1] = member.offset, member.size
            self.cls[row] = extension == "cls"
            return fresh
        return True


def _refused(path: Path, data: np.ndarray, key: str) -> str:
    """Why a sample cannot be one: from a second walk, because the index does not keep what it has no use for."""
    names = [member.name for member in tar.members(path, data) if split_name(member.name)[0] == key]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"{path} has {twice} twice. Make the shard again without the repetition."
    extensions = [split_name(name)[1] for name in names]
    found = [extension for extension in extensions if extension.rpartition(".")[2] in ARRAYS]
    has = " and ".join(f".{extension}" for extension in found or extensions)
    return f"{path}: sample {key} has {has}: expected exactly one of {', '.join(f'.{name}' for name in ARRAYS)}."


def split_name(member: str) -> tuple[str, str]:
    """`a/b.x.npy` -> (`a/b`, `x.npy`): WebDataset's key ends at the first dot of the last part of the path."""
    folder, slash, file = member.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def decode(data: np.ndarray, is_array: bool, place: Place, channels: int | None = None, x: X | None = None) -> np.ndarray:
    """Image -> (C, H, W) uint8, one channel for greys and three for anything else; .npy -> uint8 or float32.

    An array (H, W) of uint8 is an image of one channel; other floating types become float32. Where a set has `channels`
    = 3, grey images are spread over them. An image of another size than `x` is not even decoded. Raises DataError.
    """
    if is_array:
        return _array(data, place)
    from PIL import Image  # blocks of arrays need none

    try:
        content = memoryview(data)
        if bytes(content[:8]) == PNG_SIGNATURE:
            _check_png(content)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{place} has more than 8 bits a channel, which would be lost. Store it as .npy of float32.")
        alone = image.mode in GREY and channels != 3
        mode = "L" if alone else "RGB"
        if x is not None and (image.height, image.width) != x.shape[1:]:
            require(x, np.dtype(np.uint8), (1 if alone else 3, image.height, image.width), place)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))  # (H, W) or (H, W, 3)
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(_damaged_image(place, error)) from error
    return pixels[None] if alone else pixels.transpose(2, 0, 1)


def _check_png(content: memoryview) -> None:
    """Raises ValueError unless every chunk is there with its checksum: Pillow reads pixels past a wrong one. JPEG has none."""
    at = len(PNG_SIGNATURE)
    while True:
        size, kind = int.from_bytes(content[at : at + 4], "big"), bytes(content[at + 4 : at + 8])
        end = at + 8 + size  # of the content of the chunk: its checksum follows
        if end + 4 > len(content):
            raise ValueError("it ends before its IEND chunk")
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError(f"the checksum of its chunk at byte {at:,} is another")
        if kind == b"IEND":
            return
        at = end + 4


def grey(data: np.ndarray, place: Place) -> bool:
    """Whether an encoded image has one channel, from its header. Raises DataError."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).mode in GREY
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(_damaged_image(place, error)) from error


def x_of(dtype: np.dtype, shape: tuple[int, ...], place: object) -> X:
    """What a first sample says about its set; the range of floats stays open until somebody has looked at them all."""
    kinds = {1: "vector", 2: "signal", 3: "image"}
    if len(shape) not in kinds or (len(shape) == 3 and shape[0] > 4):
        raise DataError(
            f"{place} has shape {shape}: expected (D,) for vectors, (C, T) for signals or (C, H, W) with at most 4 "
            "channels for images."
        )
    limits = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
    return X(kind=kinds[len(shape)], dtype=dtype.name, shape=shape, range=limits)


def require(x: X, dtype: np.dtype, shape: tuple[int, ...], place: object) -> None:
    """Raise DataError unless a sample is what the data set's samples are."""
    if dtype != x.dtype or shape != x.shape:
        raise DataError(
            f"{place} is {dtype} {shape}, but the data set holds {x.dtype} {x.shape}. "
            "All samples must be alike: `ssl-ae data pack` resizes images with --size."
        )


def not_finite(place: object) -> str:
    return f"{place} holds NaN or infinity. Correct it."


def label(cls: bytes | None, sidecar: bytes | None, place: object) -> Any:
    """The content of `.cls`, else `label` in the `.json`: a number, a name, a list of numbers; None without either."""
    if cls is not None:
        text = cls.decode("utf-8", "replace").strip()
        number = text.removeprefix("-").isdecimal()
        if number and len(text) > DIGITS:
            raise DataError(f"{place}: the .cls member is a number of {len(text):,} digits: expected a class or a number.")
        return int(text) if number else text or None
    if sidecar is None:
        return None
    try:
        content = json.loads(sidecar)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: the .json member is damaged: {error}. Fetch the shard again.") from error
    found = content.get("label") if isinstance(content, dict) else None
    numbers = isinstance(found, list) and all(isinstance(item, int | float) for item in found)
    if found is None or isinstance(found, int | float | str) or numbers:
        return found
    raise DataError(f"{place}: label = {found!r} in the .json member: expected a number, a name or a list of numbers.")


def _of(data: np.ndarray, span: np.ndarray) -> np.ndarray:
    offset, size = span.tolist()
    return data[offset : offset + size]


def stored_array(content: np.ndarray, place: object) -> np.ndarray:
    """A view of the array in the bytes of an .npy file, (size,) uint8. Raises DataError; never unpickles."""
    header = io.BytesIO(content[:NPY_HEADER_BYTES].tobytes())
    try:
        version = np.lib.format.read_magic(header)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(header)
    except NPY_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: the .npy member is damaged: {reason}. Make or fetch the shard again.") from error
    stated = header.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise DataError(f"{place} holds Python objects, which are never unpickled: expected uint8 or floats.")
    if min(shape, default=0) < 1 or stated != len(content):
        raise DataError(
            f"{place}: the .npy member of {len(content):,} bytes says it is {dtype} {shape}. Make or fetch the shard again."
        )
    return np.ndarray(shape, dtype, buffer=content, offset=header.tell(), order="F" if fortran else "C")


def _array(data: np.ndarray, place: object) -> np.ndarray:
    array = stored_array(data, place)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        raise DataError(f"{place} holds {array.dtype.name}: expected uint8 or floats.")
    return np.ascontiguousarray(array[None] if array.dtype == np.uint8 and array.ndim == 2 else array)


def _damaged_image(place: Place, error: Exception) -> str:
    return f"{place}: the image is damaged: {error}. Fetch the shard again."
