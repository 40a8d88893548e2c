"""In which order samples are seen: an endless stream of epochs, each a permutation that (seed, epoch) alone decides.

A batch is a stretch of the stream, so every batch has the same size and a position is one number: nothing else has to be
saved to resume, and the global batch is the same for any number of ranks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

WINDOW_ROWS = 65_536  # rows shuffled together when streaming: far above a block, far below memory


class Order:
    """Endless stream over `members` (row numbers), reshuffled each epoch by a counter-based generator.

    With `block_starts`, more rows than a window are shuffled along the disk's grain: blocks are permuted, then rows
    within windows of the result, so that a window of the stream touches few blocks.
    """

    def __init__(self, members: np.ndarray, seed: int, stream: int = 0, block_starts: np.ndarray | None = None) -> None:
        self.members = np.asarray(members, dtype=np.int64)
        self.seed, self.stream, self.block_starts = seed, stream, block_starts
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def take(self, start: int, count: int) -> np.ndarray:
        """Rows at positions start .. start + count of the stream, (count,) int64."""
        size, parts = len(self.members), []
        if size == 0 and count > 0:
            raise ValueError("an order of no rows has nothing to take")
        while count > 0:
            epoch, offset = divmod(start, size)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        # the counter leaves 2^64 numbers to each (stream, epoch) of a seed
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, self.stream]))
        if self.block_starts is None or len(self.members) <= WINDOW_ROWS:
            return self.members[generator.permutation(len(self.members))]
        blocks = np.split(self.members, np.searchsorted(self.members, self.block_starts[1:]))
        blocks = [blocks[i] for i in generator.permutation(len(blocks))]
        rows = np.concatenate(blocks)
        windows = [rows[i : i + WINDOW_ROWS] for i in range(0, len(rows), WINDOW_ROWS)]
        return np.concatenate([generator.permutation(window) for window in windows])
