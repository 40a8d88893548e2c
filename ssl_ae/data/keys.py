"""The keys of many samples at 16 bytes each: arrays of numpy's own strings, and how one is found in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

TEXT = np.dtypes.StringDType()  # UTF-8; up to 15 bytes lie in the 16 that a key takes


class NumberedKeys(Sequence[str]):
    """Keys of samples that have only a position: `train-00000017`, counted from 0. None is held."""

    def __init__(self, split: str, rows: int) -> None:
        self._split, self._rows = split, range(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (f"{self._split}-{row:08d}" for row in self._rows)

    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [f"{self._split}-{row:08d}" for row in self._rows[at]]
        return f"{self._split}-{self._rows[at]:08d}"


def as_keys(keys: Iterable[str]) -> np.ndarray:
    """(n,) of numpy's StringDType: indexing, comparing, `tolist` and iteration give and take str."""
    return np.array(keys if isinstance(keys, list | np.ndarray) else list(keys), dtype=TEXT)


def repeated(parts: Sequence[Sequence[str]]) -> str | None:
    """A key that stands twice in the parts together, or None. Holds 8 bytes a key."""
    hashes = np.concatenate([np.empty(0, np.int64), *map(_hashes, parts)])
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return None
    counts = Counter(key for part in parts for key in part)  # two keys of one hash are no repetition
    return next((key for key, count in counts.items() if count > 1), None)


def rows_of(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(n,) int64: where each of n keys stands in `among`, whose keys are unique; -1 where it does not. Both by `as_keys`."""
    if not len(among) or not len(keys):
        return np.full(len(keys), -1, dtype=np.int64)
    start = int(np.argmax(among == keys[0]))
    if np.array_equal(among[start : start + len(keys)], keys):  # a split's, in the table that was packed with it
        return np.arange(start, start + len(keys))
    known, wanted = _hashes(among), _hashes(keys)
    # both in order: a search that jumps about in memory takes ten times as long
    order, asked = np.argsort(known), np.argsort(wanted)
    rows = np.empty(len(keys), dtype=np.int64)
    rows[asked] = order[np.searchsorted(known[order], wanted[asked]).clip(max=len(among) - 1)]
    alike, same = known[rows] == wanted, among[rows] == keys
    if (alike & ~same).any():  # a stranger with the hash of a key, or two keys of one hash
        row_of = dict(zip(among, range(len(among)), strict=True))
        return np.fromiter((row_of.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
    return np.where(same, rows, -1)


def _hashes(keys: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(str.__hash__, keys), dtype=np.int64, count=len(keys))
