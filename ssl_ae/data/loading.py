"""From rows on disk to batches on the device: resident (decoded once, one index-select a batch) or streaming (prefetched)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from ssl_ae.data.card import X
from ssl_ae.data.order import Order
from ssl_ae.errors import DataError
from ssl_ae.trace import UNLABELED, Batch, known

RESIDENT_SHARE = 0.3  # of the free memory that decoded samples may take before `auto` streams
PREFETCH = 4  # reads ahead when streaming: of one batch each, or of several small ones, which cost as much apiece
READ_BATCHES, READ_BYTES = 8, 2**20  # at most, of one read

Residency = Literal["auto", "resident", "stream"]
Request = tuple[np.ndarray, np.ndarray]  # (n,) rows of a batch, and (n,) whether each was drawn uniformly


class Rows(Protocol):
    """What loading asks of a split."""

    rows: int
    row_bytes: int  # of a sample as stored
    block_starts: np.ndarray

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n,) row numbers -> (n, *shape) as stored."""


class Scaling(torch.nn.Module):
    """Stored samples -> model inputs, on the device: x * factor - shift, float32 (B, *shape).

    range: the card's range goes to [0, 1]. standard: each feature to zero mean and unit variance over train. none: as stored.
    """

    def __init__(self, x: X, how: str) -> None:
        super().__init__()
        low, high = x.range
        factor, shift = torch.ones(()), torch.zeros(())
        if how == "range":
            if not np.isfinite([low, high]).all() or high <= low:
                raise DataError(
                    f"data.scale: range needs a finite range of values, but the card says [{low}, {high}]. Use standard."
                )
            factor, shift = torch.tensor(1.0 / (high - low)), torch.tensor(low / (high - low))
        elif how == "standard":
            if x.mean is None or x.std is None:
                raise DataError(
                    f"data.scale: standard needs the mean and std of a vector's features; this card holds a {x.kind}. Use range."
                )
            std = torch.tensor(x.std)
            factor, shift = 1.0 / std, torch.tensor(x.mean) / std
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.shifts = bool(shift.any())  # most images start at 0: a pass over every batch for nothing

    def forward(self, stored: Tensor) -> Tensor:
        # in place, where the conversion made a copy: another pass over fresh memory costs as much as both
        scaled = stored * self.factor if stored.dtype == torch.float32 else stored.to(torch.float32).mul_(self.factor)
        return scaled.sub_(self.shift) if self.shifts else scaled

    def inverse(self, x: Tensor) -> Tensor:
        """Model inputs back to the values that are stored, float32."""
        return (x + self.shift) / self.factor


@dataclass(frozen=True)
class Draw:
    """What one step draws over all ranks: rows uniformly from the split, and extra rows from its labelled part."""

    uniform: int
    labeled: int = 0


class Feed:
    """The batches of one split on one rank. `y` is (N,) or (N, T), UNLABELED or NaN where training may not look.

    `guess` (N, C) are class probabilities of an earlier model, 0 in rows without.

    `ahead` is told, in good time, which rows will be streamed.
    """

    def __init__(
        self,
        split: Rows,
        y: np.ndarray | None,
        scaling: Callable[[Tensor], Tensor],
        *,
        seed: int,
        device: torch.device,
        residency: Residency = "auto",
        weight_y: np.ndarray | None = None,
        guess: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
        ahead: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self.split, self.device, self.rank, self.world = split, device, rank, world
        self.scaling = scaling
        # what is the same for every row is held once: streaming must not cost memory by the row
        self.y = torch.tensor(UNLABELED).expand(split.rows) if y is None else torch.as_tensor(y)
        self.weight_y = torch.ones(()).expand(split.rows) if weight_y is None else torch.as_tensor(weight_y, dtype=torch.float32)
        self.guess = None if guess is None else torch.as_tensor(guess, dtype=torch.float32)
        labeled = torch.tensor(False).expand(split.rows) if y is None else known(self.y)
        self.labeled_rows = np.empty(0, np.int64) if y is None else torch.nonzero(labeled)[:, 0].numpy()
        self.resident = _fits(split, device) if residency == "auto" else residency == "resident"
        self.stored = torch.from_numpy(split.read(np.arange(split.rows))).to(device) if self.resident else None
        if self.resident:
            self.y, self.weight_y, labeled = (t.to(device) for t in (self.y, self.weight_y, labeled))
            self.guess = None if self.guess is None else self.guess.to(device)
        self.labeled = labeled
        # the same order for resident rows: free memory, which `auto` looks at, differs between ranks and from day to day
        ahead = None if self.resident else ahead
        self.uniform_order = Order(split.rows, seed, stream=0, block_starts=split.block_starts, ahead=ahead)
        self.labeled_order = Order(self.labeled_rows, seed, stream=1)

    def batches(self, requests: Iterable[tuple[Draw, int]]) -> Iterator[Batch]:
        """One batch a request: this rank's share of the k-th step that draws so. Streaming reads ahead in a thread."""
        if self.resident:
            yield from (self._batch(*self._rows(draw, k)) for draw, k in requests)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
            waiting: deque = deque()
            try:
                for wanted in self._reads(self._rows(draw, k) for draw, k in requests):
                    waiting.append(reader.submit(self._read, wanted))
                    if len(waiting) > PREFETCH:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def in_order(self, batch_rows: int, rows: np.ndarray | range | None = None) -> Iterator[Batch]:
        """The given rows, or this rank's share of all of them, once and in order."""
        rows = np.arange(self.split.rows)[self.rank :: self.world] if rows is None else np.asarray(rows, dtype=np.int64)
        for start in range(0, len(rows), batch_rows):
            part = rows[start : start + batch_rows]
            yield self._batch(part, np.ones(len(part), dtype=bool))

    def _rows(self, draw: Draw, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and whether each was drawn uniformly: rank r takes every world-th of the global batch."""
        uniform = self.uniform_order.take(k * draw.uniform, draw.uniform)[self.rank :: self.world]
        if not draw.labeled:
            return uniform, np.ones(len(uniform), dtype=bool)
        # the offset keeps ranks even when both draws leave a remainder
        labeled = self.labeled_order.take(k * draw.labeled, draw.labeled)[self.world - 1 - self.rank :: self.world]
        return np.concatenate([uniform, labeled]), np.arange(len(uniform) + len(labeled)) < len(uniform)

    def _reads(self, wanted: Iterable[Request]) -> Iterator[list[Request]]:
        """Batches that are read together."""
        wanted = iter(wanted)
        while first := list(islice(wanted, 1)):
            room = READ_BYTES // max(1, len(first[0][0]) * self.split.row_bytes)
            yield first + list(islice(wanted, min(READ_BATCHES, max(1, room)) - 1))

    def _read(self, wanted: list[Request]) -> list[Batch]:
        stored = torch.from_numpy(self.split.read(np.concatenate([rows for rows, _ in wanted])))
        parts = stored.split([len(rows) for rows, _ in wanted])
        return [self._batch(rows, uniform, part) for (rows, uniform), part in zip(wanted, parts, strict=True)]

    def _batch(self, rows: np.ndarray, uniform: np.ndarray, stored: Tensor | None = None) -> Batch:
        """The batch of some rows; `stored` where they have been read."""
        at = torch.from_numpy(rows)
        index = at.to(self.device, non_blocking=True)
        if self.resident:
            stored, at = self.stored.index_select(0, index), index  # copies rows whole; `stored[index]` walks their elements
        elif stored is None:
            stored = torch.from_numpy(self.split.read(rows))
        sides = (t.index_select(0, at) for t in (self.y, self.weight_y, self.labeled))
        stored, mask, y, weight_y, labeled = (
            t.to(self.device, non_blocking=True) for t in (stored, torch.from_numpy(uniform), *sides)
        )
        guess = None if self.guess is None else self.guess.index_select(0, at).to(self.device, non_blocking=True)
        return Batch(x=self.scaling(stored), y=y, labeled=labeled, row=index, uniform=mask, weight_y=weight_y, guess=guess)


@dataclass(frozen=True)
class Table:
    """Samples already in memory as a split: stored latents, on which heads are trained."""

    x: np.ndarray  # (N, *shape)

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def row_bytes(self) -> int:
        return self.x.nbytes // max(1, self.rows)

    @property
    def block_starts(self) -> np.ndarray:
        return np.arange(self.rows)  # in memory a row is as near as any other

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.x[rows]


def _fits(split: Rows, device: torch.device) -> bool:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return split.rows * split.row_bytes < RESIDENT_SHARE * free
