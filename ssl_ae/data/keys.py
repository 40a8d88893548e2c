"""The keys of many samples at 16 bytes each: an array of numpy's own strings, and a check that none is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

TEXT = np.dtypes.StringDType()  # UTF-8; up to 15 bytes lie in the 16 that a key takes


def as_keys(keys: Iterable[str], count: int | None = None) -> np.ndarray:
    """(n,) of numpy's StringDType; indexing, comparing, `tolist` and iteration give and take str. `count` = n, if known."""
    return np.array(keys if isinstance(keys, Sequence | np.ndarray) else list(keys), dtype=TEXT)


def repeated(parts: Iterable[Iterable[str]]) -> str | None:
    """A key that stands twice in the parts together, or None. Holds 8 bytes a key, not the keys."""
    parts = list(parts)
    hashes = np.concatenate([np.empty(0, np.int64), *(np.fromiter(map(str.__hash__, part), np.int64) for part in parts)])
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return None
    counts = Counter(key for part in parts for key in part)  # two keys of one hash are no repetition
    return next((key for key, count in counts.items() if count > 1), None)
