"""A data set on disk: its card, its splits by row, and their labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from ssl_ae import files
from ssl_ae.data import card as cards
from ssl_ae.data.card import Card
from ssl_ae.data.damage import FAIL, Damage, Loss, Memory, Tolerance, hashes, tell
from ssl_ae.data.foreign import Foreign, Part, read_foreign
from ssl_ae.data.keys import as_keys
from ssl_ae.data.labels import UNLABELED, LabelTable, aligned
from ssl_ae.data.remote import Remote, opened
from ssl_ae.data.shards import BLOCK_ROWS, ShardReader, as_slice, by_part, check_size, verify_sha256
from ssl_ae.errors import DataError

T = TypeVar("T")
Verify = Literal["new", "all", "none"]  # which files are compared with the card when a data set is opened


class Split:
    """The samples of one split by row number, across its shards. A shard is opened when one of its rows is read."""

    def __init__(self, folder: Path, name: str, card: Card, part: Part | None = None, remote: Remote | None = None) -> None:
        entry = card.split(name)
        self.name = name
        self.rows = entry.rows
        self.x = card.x
        self.row_bytes = card.x.size * np.dtype(card.x.dtype).itemsize
        self.is_remote = remote is not None  # then it pays to say early what will be read
        self._folder, self._shards, self._part, self._remote = folder, entry.shards, part, remote
        counts = [shard.rows for shard in entry.shards]
        self._stored = sum(counts)
        self._starts = np.cumsum([0, *counts])[:-1]
        self._readers: dict[int, ShardReader] = {} if part is None else dict(enumerate(part.readers))
        if part is None and self._stored != self.rows:
            raise DataError(
                f"{folder / cards.FILE_NAME}: split {name!r} has {self.rows} rows, but its shards have {self._stored}. "
                "Pack the source again."
            )

    @cached_property
    def keys(self) -> np.ndarray:
        """(rows,) text, by `as_keys`."""
        if self._part is not None:
            return self._part.keys
        if self._remote:
            self._remote.expect(self._shards)
        parts = [as_keys(self._keys_of(index)) for index in range(len(self._shards))]
        return np.concatenate(parts) if parts else as_keys([])

    @cached_property
    def block_starts(self) -> np.ndarray:
        """(b,) int64: the first row of every block; rows of one block lie together on disk, or come in one transfer."""
        if self._part is not None:
            return np.arange(0, self.rows, BLOCK_ROWS)
        if self._remote:
            return self._starts
        starts = [start + self._reader(index).block_starts for index, start in enumerate(self._starts)]
        return np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n, *shape) in the stored dtype: the samples of n row numbers, in the order asked."""
        rows = np.asarray(rows, dtype=np.int64)
        stored = rows if self._part is None else self._part.selection[rows]
        out = np.empty((len(rows), *self.x.shape), self.x.dtype)
        if self._remote:
            self.expect(stored)
        for shard, at, inside in by_part(self._starts, self._stored, stored):
            place = as_slice(at)
            if isinstance(place, slice):
                self._with(shard, lambda reader, inside=inside, to=out[place]: reader.read(inside, out=to))
            else:
                out[place] = self._with(shard, lambda reader, inside=inside: reader.read(inside))
        return out

    def expect(self, rows: np.ndarray) -> None:
        """These rows will be read soon: shards that are not on this machine begin to come."""
        if self._remote and len(rows):
            shards = np.searchsorted(self._starts, rows, side="right") - 1
            _, first = np.unique(shards, return_index=True)
            wanted = shards[np.sort(first)].tolist()
            if len(wanted) == 1 and wanted[0] + 1 < len(self._shards):
                wanted.append(wanted[0] + 1)  # who reads from one shard alone goes through them in order
            self._remote.expect([self._shards[index] for index in wanted])

    def _keys_of(self, index: int) -> list[str]:
        known = self._remote.keys_of(self._shards[index]) if self._remote else None
        if known is None:
            known = self._with(index, lambda reader: reader.keys())
            if self._remote:
                self._remote.keep_keys(self._shards[index], known)
        return known

    def _with(self, index: int, use: Callable[[ShardReader], T]) -> T:
        """What `use` makes of a shard; again where the shard left the cache meanwhile."""
        for last in (False, False, True):
            try:
                return use(self._reader(index))
            except DataError:
                if last or not self._remote or self._remote.holds(self._shards[index]):
                    raise
        raise AssertionError

    def _reader(self, index: int) -> ShardReader:
        shard, known = self._shards[index], self._readers.get(index)
        path = self._remote.shard(shard) if self._remote else self._folder / shard.file
        if known is None or (self._remote and not known.is_current()):
            self._readers[index] = known = ShardReader(path, self.x, shard)
        return known


class DataSet:
    """A folder that `ssl-ae data pack` made, or one of WebDataset shards made elsewhere."""

    def __init__(
        self,
        path: Path,
        card: Card,
        parts: dict[str, Part],
        table: LabelTable | None,
        losses: Sequence[str] = (),
        remote: Remote | None = None,
    ) -> None:
        self.folder = path  # where its card lies on this machine
        self.path = remote.url if remote else path  # where it is opened again
        self._remote = remote
        self.card = card  # of what is read: without what was left out
        self.losses = losses  # what was left out, in words
        self._parts = parts
        self._table = table
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, path: Path | str, verify: Verify = "new", tolerance: Tolerance = FAIL) -> DataSet:
        """Open a folder by its card, or walk its shards where it has none.

        Each shard's bytes are compared with the card: `new` reads those that have not been read since they were last
        changed, `all` reads all, `none` leaves damage to be found by whoever reads the samples.
        Raises DataError for a folder that is absent, without shards, or damaged beyond what is to be skipped.
        """
        path = opened(path)
        if isinstance(path, Remote):
            return cls._behind(path, verify, tolerance)
        if not path.is_dir():
            raise DataError(f"{path} is no folder. Make the data set with `ssl-ae data pack SOURCE {path}`.")
        if (path / cards.FILE_NAME).exists():
            card, losses = Card.load(path), ()
            if verify != "none":
                card, losses = _whole(path, card, Memory(path) if verify == "new" else None, tolerance)
            return cls(path, card, {}, None, losses)
        if (path / cards.LABELS_FILE_NAME).exists():
            raise DataError(f"{path} has {cards.LABELS_FILE_NAME} but lost its {cards.FILE_NAME}. Pack the source again.")
        foreign = read_foreign(path, tolerance)
        return cls(path, foreign.card, foreign.parts, _table(foreign), foreign.losses)

    @classmethod
    def _behind(cls, remote: Remote, verify: Verify, tolerance: Tolerance) -> DataSet:
        """The data set behind a URL. Its shards come when they are read, or all of them once to find the damaged ones."""
        if not remote.fetch_card():
            remote.fetch_shards()
            foreign = read_foreign(remote.folder, tolerance)
            card = foreign.card.model_copy(update={"name": remote.url.rpartition("/")[2], "source": remote.url})
            return cls(remote.folder, card, foreign.parts, _table(foreign), foreign.losses)
        card = Card.load(remote.folder)
        losses: Sequence[str] = ()
        if verify == "all" or tolerance.skip:
            damaged = _damaged_behind(remote, card, tolerance)
            card, losses = _without(card, damaged, remote.url, tolerance)
        return cls(remote.folder, card, {}, None, losses, remote)

    def local(self, shard: cards.Shard) -> Path:
        """Where a shard lies on this machine; one behind a URL is fetched first. Raises DataError."""
        return self._remote.shard(shard) if self._remote else self.folder / shard.file

    def split(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = Split(self.folder, name, self.card, self._parts.get(name), self._remote)
        return self._splits[name]

    def labels(self, split: str) -> np.ndarray:
        """What the set knows of a split: (rows,) int64 with -1 where unknown, or (rows, T) float32 with NaN there."""
        if self.card.y is None:
            return np.full(self.split(split).rows, UNLABELED, dtype=np.int64)
        return aligned(self.label_table, self.split(split).keys)

    @property
    def labels_sha256(self) -> str | None:
        """sha256 of the labels as they are now, which may be others than were packed; None where they are in the shards."""
        path = self.folder / cards.LABELS_FILE_NAME
        return files.sha256_of(path) if path.exists() else None

    @cached_property
    def label_table(self) -> LabelTable:
        """The labels that came with the data. Raises DataError where there are none."""
        if self.card.y is None:
            raise DataError(f"{self.path} has no labels. Name a file with columns key and label: --labels FILE.")
        return self._table or LabelTable.read(self.folder / cards.LABELS_FILE_NAME, self.card.y)

    def read_labels(self, path: Path) -> LabelTable:
        """A user's label table for this data set; it says itself what labels mean where the card does not.

        Raises DataError for a label that the card does not allow and for a key that no split has.
        """
        table = LabelTable.read(path, self.card.y)
        if not self.card.left_out:  # else a key that no split has may well be that of a sample that was left out
            table.check_keys(chain.from_iterable(self.split(name).keys for name in self.card.splits), path)
        return table


def _whole(path: Path, card: Card, memory: Memory | None, tolerance: Tolerance) -> tuple[Card, Sequence[str]]:
    """The card without the shards that are not what it says, as far as they may be left out; and what was, in words."""
    shards = {shard.file: shard for split in card.splits.values() for shard in split.shards}
    damaged: dict[str, DataError] = {}
    for file, shard in shards.items():  # sizes first: they cost nothing
        with _into(damaged, file, tolerance):
            check_size(path / file, shard)
    found = hashes([path / file for file in shards if file not in damaged], memory)
    for place, sha256 in found.items():
        with _into(damaged, place.name, tolerance):
            if isinstance(sha256, DataError):
                raise sha256
            verify_sha256(place, shards[place.name], sha256)
    if memory:
        memory.save()
    return _without(card, damaged, str(path), tolerance)


def _damaged_behind(remote: Remote, card: Card, tolerance: Tolerance) -> dict[str, DataError]:
    """Every shard that did not come whole, which a shard whose keys are known once did."""
    damaged: dict[str, DataError] = {}
    for split in card.splits.values():
        unseen = [shard for shard in split.shards if remote.keys_of(shard) is None]
        remote.expect(unseen)
        for shard in unseen:
            with _into(damaged, shard.file, tolerance, Damage):
                remote.keep_keys(shard, ShardReader(remote.shard(shard), card.x, shard).keys())
    return damaged


def _without(card: Card, damaged: dict[str, DataError], place: str, tolerance: Tolerance) -> tuple[Card, Sequence[str]]:
    """The card without damaged shards, and what was left out, in words."""
    if not damaged:
        return card, ()
    splits, losses = {}, []
    for name, split in card.splits.items():
        kept = tuple(shard for shard in split.shards if shard.file not in damaged)
        losses += [Loss(name, shard.rows, str(damaged[shard.file])) for shard in split.shards if shard.file in damaged]
        splits[name] = cards.Split(rows=sum(shard.rows for shard in kept), shards=kept)
    told = tell(losses, {name: split.rows for name, split in splits.items()}, place, tolerance.limit)
    return card.model_copy(update={"splits": splits, "left_out": dict.fromkeys(damaged)}), told


def _table(foreign: Foreign) -> LabelTable | None:
    return None if foreign.labels is None else LabelTable(foreign.keys, foreign.labels, y=foreign.card.y)


@contextlib.contextmanager
def _into(damaged: dict[str, DataError], file: str, tolerance: Tolerance, kind: type[DataError] = DataError) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if not tolerance.skip:
            raise
        damaged[file] = error
