"""The order of samples at the size of a cluster: what one rank of many pays for its part of each global batch.

    python -m tests.benchmarks.sampler [--rows 1000000000] [--ranks 1000] [--batch 256000]

No sample is read: this is the order alone, as `Feed` asks for it, from the beginning of an epoch and from the middle of one, as
a resumed run does: windows are drawn one after another, so that takes as long as drawing half an epoch.
Times are the processor's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import psutil

from ssl_ae.data.order import WINDOW_ROWS, Order

BLOCK_ROWS = 1024  # of what `data pack` writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256_000, help="rows of the global batch")
    parser.add_argument("--batches", type=int, default=100)
    given = parser.parse_args()
    process = psutil.Process()
    before = process.memory_info().rss
    order, seconds = timed(lambda: Order(given.rows, seed=0, block_starts=np.arange(0, given.rows, BLOCK_ROWS)))
    print(f"{given.rows:,} rows in blocks of {BLOCK_ROWS:,}, {given.ranks:,} ranks, global batch {given.batch:,}")
    print(f"made in {seconds:.2f} s")
    steps = given.rows // given.batch
    for place, first in (("start", 0), ("middle", steps // 2)):
        part, seconds = timed(lambda first=first: share(order, first, given))
        print(f"{place} of the epoch: first batch {seconds:.2f} s", end="")
        each = [timed(lambda k=k: share(order, k, given))[1] for k in range(first + 1, first + 1 + given.batches)]
        print(f", then {1e3 * statistics.median(each):.2f} ms for {len(part):,} rows of this rank")
    held = (process.memory_info().rss - before) / 2**20
    print(f"memory: {held:,.0f} MiB, of which the shard index takes {order.block_starts.nbytes / 2**20:,.0f}")
    print(f"a window of {WINDOW_ROWS:,} rows lies in about {WINDOW_ROWS // BLOCK_ROWS + 1} blocks")


def share(order: Order, k: int, given: argparse.Namespace) -> np.ndarray:
    """The rows of one rank in the k-th global batch."""
    return order.take(k * given.batch, given.batch)[given.ranks // 2 :: given.ranks]


def timed(work) -> tuple[object, float]:
    started = time.process_time()
    return work(), time.process_time() - started


if __name__ == "__main__":
    main()
