"""Shards: WebDataset tars that hold blocks of samples, written whole and read through a memory map."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ssl_ae import files
from ssl_ae.data import tar
from ssl_ae.data.card import Shard, X
from ssl_ae.data.samples import BLOCK_ROWS, Samples, not_finite, require, split_name, stored_array, x_of
from ssl_ae.data.tar import Member
from ssl_ae.errors import DataError, listing

BLOCK_BYTES = 16 * 2**20  # large images get shorter blocks: a block is what a streaming reader holds at once
SHARD_BYTES = 256 * 2**20
BLOCK_X, BLOCK_KEYS = "x.npy", "key.json"
GATHER_ROWS = 4096  # copied at once: bounds the copy that numpy makes on the way
OPEN_MAPS = 256  # a map holds a file descriptor, of which a process has 1,024 as a rule
MAPPED_BYTES = 512 * 2**20  # read through maps before they are let go: pages that were read count as memory of the process


class ShardWriter:
    """Writes the samples of one split, in order, to `SPLIT-000000.tar`, `SPLIT-000001.tar`, ...

    A block of n samples is two members: `000000.x.npy` (n, *shape) and `000000.key.json`, a list of n keys. Equal
    samples give equal bytes. As a context manager it leaves no unfinished shard behind when an exception passes.
    """

    def __init__(self, folder: Path, split: str, block_rows: int = BLOCK_ROWS, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._split = folder, split
        self._block_rows, self._shard_bytes = block_rows, shard_bytes
        self._keys: list[str] = []
        self._x: list[np.ndarray] = []
        self._kind: tuple[str, tuple[int, ...]] | None = None  # dtype and shape of a sample
        self._shards: list[Shard] = []
        self._open = contextlib.ExitStack()
        self._path = folder
        self._tar = None
        self._blocks = self._rows = self._bytes = 0  # of the open shard

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._open.__exit__(kind, error, trace)

    def write(self, keys: Sequence[str], x: np.ndarray) -> None:
        """Append samples x (n, *shape), uint8 or float32, under their n keys."""
        if len(keys) != len(x):
            raise ValueError(f"{len(keys)} keys for {len(x)} samples")
        if not len(keys):
            return
        kind = (x.dtype.name, x.shape[1:])
        if kind[0] not in ("uint8", "float32") or kind != (self._kind or kind):
            raise ValueError(f"samples {kind} after {self._kind}: expected uint8 or float32, all of one dtype and shape")
        self._kind = kind
        self._keys.extend(map(str, keys))
        self._x.append(np.array(x))  # a copy: the caller may use its buffer again
        rows = max(1, min(self._block_rows, BLOCK_BYTES // max(1, x[0].nbytes)))
        if len(self._keys) >= rows:
            pending = np.concatenate(self._x)
            whole = len(pending) // rows * rows
            for start in range(0, whole, rows):
                self._write_block(self._keys[start : start + rows], pending[start : start + rows])
            self._keys, self._x = self._keys[whole:], [pending[whole:].copy()] if whole < len(pending) else []

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return them all; none when nothing was written."""
        if self._keys:
            self._write_block(self._keys, np.concatenate(self._x))
            self._keys, self._x = [], []
        self._finish_shard()
        return tuple(self._shards)

    def _write_block(self, keys: list[str], x: np.ndarray) -> None:
        array = io.BytesIO()
        np.lib.format.write_array(array, np.ascontiguousarray(x), allow_pickle=False)
        names = json.dumps(keys, ensure_ascii=False).encode()
        size = sum(tar.BLOCK + tar.padded(length) for length in (array.tell(), len(names)))  # with their headers
        if self._tar is not None and self._bytes + size > self._shard_bytes:
            self._finish_shard()
        if self._tar is None:
            self._start_shard()
        self._tar.write({"__key__": f"{self._blocks:06d}", BLOCK_X: array.getbuffer(), BLOCK_KEYS: names})
        self._blocks += 1
        self._rows += len(keys)
        self._bytes += size

    def _start_shard(self) -> None:
        from webdataset.writer import TarWriter  # here, because importing webdataset takes a second

        self._path = self._folder / f"{self._split}-{len(self._shards):06d}.tar"
        aside = self._open.enter_context(files.whole_file(self._path))
        stream = self._open.enter_context(open(aside, "wb"))  # noqa: SIM115 the stack closes it
        writer = TarWriter(stream, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)
        self._tar = self._open.enter_context(writer)
        self._blocks = self._rows = self._bytes = 0

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar = None
        self._open.close()  # the tar, the stream, then the rename; where one of them fails, what was written aside goes
        self._shards.append(
            Shard(
                file=self._path.name,
                rows=self._rows,
                bytes=self._path.stat().st_size,
                sha256=files.sha256_of(self._path),
            )
        )


class ShardReader:
    """Random access to one local shard: an index from its headers, and a memory map.

    Reads the blocks that `ShardWriter` writes, and shards of one file a sample (.png .jpg .jpeg .npy, with .cls or
    .json). `x`, where given, is what every sample must be; else the first sample says it. `expected` is the card's
    entry. Raises DataError for a shard that is absent, truncated, damaged in its headers, or not what `x` and
    `expected` say; what only the content of a sample or of a list of keys shows is found when that is read, and with
    `tolerant` counted by `damage` instead, as is a sample without its members.
    """

    def __init__(self, path: Path, x: X | None = None, expected: Shard | None = None, tolerant: bool = False) -> None:
        self.path = path
        self._stamp = _stamp(path, expected)
        data = self._map()
        members = tar.members(path, data)
        first = list(itertools.islice(members, 2))  # a block's two members lie together
        blocks = any(split_name(member.name)[1] == BLOCK_KEYS for member in first)
        members = itertools.chain(first, members)
        self._layout = _Blocks(path, members, data, x) if blocks else Samples(path, members, data, x, tolerant)
        if expected is not None and expected.rows != self.rows:
            raise DataError(f"{path} holds {self.rows} samples, but the card says {expected.rows}. Pack the source again.")

    @property
    def rows(self) -> int:
        return self._layout.rows

    @property
    def x(self) -> X:
        """What a sample is: as given, else as the first sample has it."""
        return self._layout.x

    @property
    def block_starts(self) -> np.ndarray:
        """(b,) int64: the first row of every block; every 1,024th row where samples are files of their own."""
        return self._layout.block_starts

    def keys(self) -> list[str]:
        return self._layout.keys(self._map())

    def labels(self, rows: Sequence[int] | None = None) -> list[Any]:
        """What the shard itself says of each sample, or of some: a class index or name, a number, a list of numbers, or None."""
        return self._layout.labels(self._map(), range(self.rows) if rows is None else rows)

    def damage(self) -> dict[int, str]:
        """{row: what is wrong with it} of the samples that cannot be used; all are read. Raises DataError for damaged keys."""
        return self._layout.damage(self._map())

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n, *shape) in the stored dtype: the samples of n rows in the order asked, into `out` where given."""
        if out is None:
            out = np.empty((len(rows), *self.x.shape), self.x.dtype)
        self._layout.read(self._map(), np.asarray(rows), out)
        _MAPS.count(out.nbytes)
        return out

    def is_current(self) -> bool:
        """Whether the file is there still, and no other."""
        try:
            return _stamp(self.path, None) == self._stamp
        except DataError:
            return False

    def _map(self) -> np.ndarray:
        return _MAPS.of(self.path, self._stamp)


class _Blocks:
    """Blocks `STEM.x.npy` (n, *shape) with `STEM.key.json`, each a view into the memory map."""

    def __init__(self, path: Path, members: Iterable[Member], data: np.ndarray, x: X | None) -> None:
        self._path = path
        self._names, offsets, rows = [], [], []
        for stem, parts in _by_block(path, members).items():
            if set(parts) != {BLOCK_X, BLOCK_KEYS}:
                raise DataError(f"{path}: block {stem} has {listing(parts, 'and')}: expected {BLOCK_X} and {BLOCK_KEYS}.")
            place = f"{path}: block {stem}"
            array = _block(data, parts[BLOCK_X], place)
            x = x or x_of(array.dtype, array.shape[1:], place)
            require(x, array.dtype, array.shape[1:], place)
            self._names.append(parts[BLOCK_KEYS])
            offsets.append(parts[BLOCK_X].offset + parts[BLOCK_X].size - array.nbytes)
            rows.append(len(array))
        self.x = x
        self._ends = np.cumsum(rows)
        self.rows = int(self._ends[-1])
        self.block_starts = self._ends - rows
        self._row_bytes = x.size * np.dtype(x.dtype).itemsize
        self._origins = np.array(offsets) - self.block_starts * self._row_bytes  # where row 0 would lie, were it of that block

    def keys(self, data: np.ndarray) -> list[str]:
        found = []
        for member, start, end in zip(self._names, self.block_starts, self._ends, strict=True):
            try:
                keys = json.loads(member.of(data).tobytes())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}: {member.name} is damaged: {error}. Pack the source again.") from error
            if not isinstance(keys, list) or len(keys) != end - start or set(map(type, keys)) != {str}:
                raise DataError(f"{self._path}: {member.name} is not a list of {end - start} keys. Pack the source again.")
            found += keys
        return found

    def labels(self, data: np.ndarray, rows: Sequence[int]) -> list[Any]:
        return [None] * len(rows)  # labels of blocks are a side table

    def damage(self, data: np.ndarray) -> dict[int, str]:
        keys, found = self.keys(data), {}
        for start, end in zip(self.block_starts.tolist(), self._ends.tolist(), strict=True):
            block = np.empty((end - start, *self.x.shape), self.x.dtype)
            self.read(data, np.arange(start, end), block)
            odd = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1)) + start
            found |= {row: not_finite(f"{self._path}: sample {keys[row]}") for row in odd.tolist()}
        return found

    def read(self, data: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        size = self._row_bytes
        within(rows, self.rows)
        # every stretch of so many bytes in the shard, of which numpy copies those that are rows: one call for all blocks
        stretches = np.ndarray((len(data) - size + 1, size), np.uint8, buffer=data, strides=(1, 1))
        flat = np.ndarray((len(rows), size), np.uint8, buffer=out)
        for start in range(0, len(rows), GATHER_ROWS):
            part = rows[start : start + GATHER_ROWS]
            block = np.searchsorted(self.block_starts, part, side="right") - 1
            flat[start : start + GATHER_ROWS] = stretches[self._origins[block] + part * size]


def by_part(starts: np.ndarray, total: int, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Group n rows of a sequence of parts: (part, which of the n they are, where in the part they lie).

    starts: (p,) ascending first rows, starts[0] = 0. Raises IndexError for a row outside [0, total).
    """
    if not len(rows):
        return
    within(rows, total)
    part = np.searchsorted(starts, rows, side="right") - 1  # empty parts share a start: the last one owns the row
    order = np.argsort(part, kind="stable")
    edges = np.flatnonzero(np.diff(part[order])) + 1
    for at in np.split(order, edges):
        owner = int(part[at[0]])
        yield owner, at, rows[at] - starts[owner]


def within(rows: np.ndarray, total: int) -> None:
    """Raise IndexError for a row outside [0, total)."""
    if len(rows) and (rows.min() < 0 or rows.max() >= total):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {total}")


def as_slice(index: np.ndarray) -> np.ndarray | slice:
    """The same index as a slice where it is consecutive: numpy then copies memory instead of gathering rows."""
    consecutive = index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all()
    return slice(int(index[0]), int(index[-1]) + 1) if consecutive else index


def check_size(path: Path, expected: Shard) -> None:
    """Raises DataError unless the file is there with as many bytes as the card says."""
    _stamp(path, expected)


def verify_sha256(path: Path, expected: Shard, found: str | None = None) -> None:
    """Raises DataError unless the bytes of `path`, whose sha256 is `found` where it is known, are those that the card names."""
    if (found or files.sha256_of(path)) != expected.sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the card's. Pack the source again, or restore the file.")


def _stamp(path: Path, expected: Shard | None) -> tuple[int, ...]:
    """What tells this file from another that later takes its name. Raises DataError unless its size is the card's."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Pack the source again, or restore the file.") from error
    if expected is not None and status.st_size != expected.bytes:
        raise DataError(
            f"{path} has {status.st_size:,} bytes, but the card says {expected.bytes:,}: it is truncated or replaced. "
            "Pack the source again, or restore the file."
        )
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Maps:
    """Memory maps of the shards that are being read. A map lives as long as somebody reads through it."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, tuple[int, ...]], np.ndarray] = {}
        self._read = 0  # bytes, since the maps were last let go

    def of(self, path: Path, stamp: tuple[int, ...]) -> np.ndarray:
        """(size,) uint8 of the file that had this stamp. Raises DataError where another has its name now."""
        found = self._open.get((path, stamp))
        if found is None:
            if len(self._open) >= OPEN_MAPS:
                self._open = {}
            if _stamp(path, None) != stamp:
                raise DataError(f"{path} was replaced while it was read. Start again.")
            size = stamp[1]  # nothing cannot be mapped; and slices of a memmap cost a microsecond more than an array's
            try:
                found = np.asarray(np.memmap(path, np.uint8, mode="r")) if size else np.empty(0, np.uint8)
            except OSError as error:  # a folder of this name, or a file that may not be read
                raise DataError(f"{path}: {error.strerror}. Restore the file, or make it readable.") from error
            self._open[path, stamp] = found
        return found

    def count(self, size: int) -> None:
        """Take note of so many bytes that were read."""
        self._read += size
        if self._read > MAPPED_BYTES:
            self._open, self._read = {}, 0


_MAPS = _Maps()


def _by_block(path: Path, members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    blocks: dict[str, dict[str, Member]] = {}
    for member in members:
        stem, extension = split_name(member.name)
        parts = blocks.setdefault(stem, {})
        if extension in parts:
            raise DataError(f"{path} has {member.name} twice. Make the shard again without the repetition.")
        parts[extension] = member
    return blocks


def _block(data: np.ndarray, member: Member, place: str) -> np.ndarray:
    """(n, *shape): a view into the shard, which lies there as it is used."""
    array = stored_array(member.of(data), place)
    if array.dtype.str not in ("|u1", "<f4") or array.ndim < 2 or not array.flags.c_contiguous:
        raise DataError(f"{place} holds {array.dtype} {array.shape}: expected rows of uint8 or float32 in C order.")
    return array
