"""A data set on disk: its card, its splits by row, and their labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_ae import files
from ssl_ae.data import card as cards
from ssl_ae.data.card import Card
from ssl_ae.data.damage import FAIL, Loss, Memory, Tolerance, hashes, tell
from ssl_ae.data.foreign import Part, read_foreign
from ssl_ae.data.keys import as_keys
from ssl_ae.data.labels import UNLABELED, LabelTable, aligned
from ssl_ae.data.shards import BLOCK_ROWS, ShardReader, as_slice, by_part, check_size, verify_sha256
from ssl_ae.errors import DataError

Verify = Literal["new", "all", "none"]  # which files are compared with the card when a data set is opened


class Split:
    """The samples of one split by row number, across its shards. A shard is opened when one of its rows is read."""

    def __init__(self, folder: Path, name: str, card: Card, part: Part | None = None) -> None:
        entry = card.split(name)
        self.name = name
        self.rows = entry.rows
        self.x = card.x
        self.row_bytes = card.x.size * np.dtype(card.x.dtype).itemsize
        self._folder, self._shards, self._part = folder, entry.shards, part
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
        parts = [as_keys(self._reader(index).keys()) for index in range(len(self._shards))]
        return np.concatenate(parts) if parts else as_keys([])

    @cached_property
    def block_starts(self) -> np.ndarray:
        """(b,) int64: the first row of every block; rows of one block lie together on disk."""
        if self._part is not None:
            return np.arange(0, self.rows, BLOCK_ROWS)
        starts = [start + self._reader(index).block_starts for index, start in enumerate(self._starts)]
        return np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n, *shape) in the stored dtype: the samples of n row numbers, in the order asked."""
        rows = np.asarray(rows, dtype=np.int64)
        stored = rows if self._part is None else self._part.selection[rows]
        out = np.empty((len(rows), *self.x.shape), self.x.dtype)
        for shard, at, inside in by_part(self._starts, self._stored, stored):
            place = as_slice(at)
            if isinstance(place, slice):
                self._reader(shard).read(inside, out=out[place])
            else:
                out[place] = self._reader(shard).read(inside)
        return out

    def _reader(self, index: int) -> ShardReader:
        if index not in self._readers:
            shard = self._shards[index]
            self._readers[index] = ShardReader(self._folder / shard.file, self.x, shard)
        return self._readers[index]


class DataSet:
    """A folder that `ssl-ae data pack` made, or one of WebDataset shards made elsewhere."""

    def __init__(
        self, path: Path, card: Card, parts: dict[str, Part], table: LabelTable | None, losses: Sequence[str] = ()
    ) -> None:
        self.path = path
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
        path = Path(path)
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
        table = None
        if foreign.labels is not None:
            table = LabelTable(foreign.keys, foreign.labels, y=foreign.card.y)
        return cls(path, foreign.card, foreign.parts, table, foreign.losses)

    def split(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = Split(self.path, name, self.card, self._parts.get(name))
        return self._splits[name]

    def labels(self, split: str) -> np.ndarray:
        """What the set knows of a split: (rows,) int64 with -1 where unknown, or (rows, T) float32 with NaN there."""
        if self.card.y is None:
            return np.full(self.split(split).rows, UNLABELED, dtype=np.int64)
        return aligned(self.label_table, self.split(split).keys)

    @property
    def labels_sha256(self) -> str | None:
        """sha256 of the labels as they are now, which may be others than were packed; None where they are in the shards."""
        path = self.path / cards.LABELS_FILE_NAME
        return files.sha256_of(path) if path.exists() else None

    @cached_property
    def label_table(self) -> LabelTable:
        """The labels that came with the data. Raises DataError where there are none."""
        if self.card.y is None:
            raise DataError(f"{self.path} has no labels. Name a file with columns key and label: --labels FILE.")
        return self._table or LabelTable.read(self.path / cards.LABELS_FILE_NAME, self.card.y)

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
    shards = {shard.file: (name, shard) for name, split in card.splits.items() for shard in split.shards}
    damaged: dict[str, DataError] = {}
    for file, (_, shard) in shards.items():  # sizes first: they cost nothing
        with _into(damaged, file, tolerance):
            check_size(path / file, shard)
    found = hashes([path / file for file in shards if file not in damaged], memory)
    for place, sha256 in found.items():
        with _into(damaged, place.name, tolerance):
            if isinstance(sha256, DataError):
                raise sha256
            verify_sha256(place, shards[place.name][1], sha256)
    if memory:
        memory.save()
    if not damaged:
        return card, ()
    splits = {}
    for name, split in card.splits.items():
        kept = tuple(shard for shard in split.shards if shard.file not in damaged)
        splits[name] = cards.Split(rows=sum(shard.rows for shard in kept), shards=kept)
    losses = [Loss(shards[file][0], shards[file][1].rows, str(error)) for file, error in damaged.items()]
    told = tell(losses, {name: split.rows for name, split in splits.items()}, str(path), tolerance.limit)
    return card.model_copy(update={"splits": splits, "left_out": dict.fromkeys(damaged)}), told


@contextlib.contextmanager
def _into(damaged: dict[str, DataError], file: str, tolerance: Tolerance) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if not tolerance.skip:
            raise
        damaged[file] = error
