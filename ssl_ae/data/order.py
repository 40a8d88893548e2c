"""In which order samples are seen: an endless stream of epochs, each a permutation that (seed, epoch) alone decides.

A batch is a stretch of the stream, so every batch has the same size and a position is one number: nothing else has to be
saved to resume, and the global batch is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

WINDOW_ROWS = 65_536  # rows shuffled together when streaming: far above a block, far below memory
KEPT = 2  # windows: a batch may lie across two


class Order:
    """Endless stream over `members`, row numbers or how many rows from 0, reshuffled each epoch by a counter-based generator.

    With `block_starts`, more rows than a window are shuffled along the disk's grain: blocks are permuted, then rows
    within windows of the result, so that a window of the stream touches few blocks, and only windows are held.
    `ahead`, where given, is told the rows of the window that follows the one in use.
    """

    def __init__(
        self,
        members: np.ndarray | int,
        seed: int,
        stream: int = 0,
        block_starts: np.ndarray | None = None,
        ahead: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self.size = members if isinstance(members, int) else len(members)
        self.members = None if isinstance(members, int) else np.asarray(members, dtype=np.int64)
        self.seed, self.stream, self.block_starts = seed, stream, block_starts
        self._window_rows = self.size if block_starts is None or self.size <= WINDOW_ROWS else WINDOW_ROWS
        self._kept: dict[tuple[int, int], np.ndarray] = {}  # windows by (epoch, index), the last that were drawn
        self._next, self._drawn = (0, 0), self._windows(0)
        self._ahead, self._told = ahead, None  # the window that `ahead` was told last

    def take(self, start: int, count: int) -> np.ndarray:
        """Rows at positions start .. start + count of the stream, (count,) int64."""
        parts = []
        if self.size == 0 and count > 0:
            raise ValueError("an order of no rows has nothing to take")
        while count > 0:
            epoch, offset = divmod(start, self.size)
            index, offset = divmod(offset, self._window_rows)
            part = self._window(epoch, index)[offset : offset + count]
            if self._ahead:
                self._tell_ahead(epoch, index)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _window(self, epoch: int, index: int) -> np.ndarray:
        if (epoch, index) in self._kept:
            return self._kept[epoch, index]
        if epoch != self._next[0] or index < self._next[1]:
            self._next, self._drawn = (epoch, 0), self._windows(epoch)
        while (epoch, index) not in self._kept:
            self._kept = dict([*self._kept.items()][1 - KEPT :]) | {self._next: next(self._drawn)}
            self._next = (epoch, self._next[1] + 1)
        return self._kept[epoch, index]

    def _tell_ahead(self, epoch: int, index: int) -> None:
        later = (epoch, index + 1) if (index + 1) * self._window_rows < self.size else (epoch + 1, 0)
        if later != self._told:
            self._told = later
            self._ahead(self._window(*later))

    def _windows(self, epoch: int) -> Iterator[np.ndarray]:
        """The rows of an epoch, a window at a time."""
        # the counter leaves 2^64 numbers to each (stream, epoch) of a seed
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, self.stream]))
        if self._window_rows == self.size:
            yield self._rows(generator.permutation(self.size))
            return
        starts = self.block_starts if self.members is None else np.searchsorted(self.members, self.block_starts)
        sizes = np.diff(starts, append=self.size)
        blocks = generator.permutation(len(starts))
        ends = np.cumsum(sizes[blocks])  # of the blocks in their new order
        shift = starts[blocks] - (ends - sizes[blocks])  # from a place in the new order to one in the old
        for start in range(0, self.size, self._window_rows):
            place = np.arange(start, min(start + self._window_rows, self.size))
            yield generator.permutation(self._rows(place + shift[np.searchsorted(ends, place, side="right")]))

    def _rows(self, places: np.ndarray) -> np.ndarray:
        return places if self.members is None else self.members[places]
