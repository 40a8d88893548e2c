"""Which train samples become the validation split where a source has none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

HELD_OUT = 10  # one sample in ten


def holdout(keys: Sequence[str]) -> np.ndarray:
    """(n,) bool: True for the first floor(n / 10) keys in the order of the sha256 of the key.

    It depends on the set of keys alone, so neither the order of a source nor a seed moves a sample between the splits.
    """
    held = np.zeros(len(keys), dtype=bool)
    held[hash_order(keys)[: len(keys) // HELD_OUT]] = True
    return held


def hash_order(keys: Iterable[str], salt: str = "") -> np.ndarray:
    """(n,) int64: the positions of the keys sorted by sha256(salt + key)."""
    # the first half of each digest: no two keys in the world share it
    halves = np.fromiter((hashlib.sha256((salt + key).encode()).digest()[:16] for key in keys), dtype="S16")
    # numpy compares "S" up to trailing zero bytes, which cannot matter here: padding restores exactly those bytes
    return np.argsort(halves, kind="stable")
