"""What two ranks cost: a global batch of 4,096 over two gloo ranks, beside two processes that train 2,048 rows each alone.

    python -m tests.benchmarks.ranks

It needs two cores, and both to itself. The four processes live side by side and take turns, pair by pair; a turn is as long
as the slower one of its pair. Printed: rows per second, and the ratio as the median over rounds ± half the distance between
the quartiles. The bar is 0.9.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import count

from ssl_ae.cores import usable_cores

BATCH, RANKS, STEPS, BAR = 4096, 2, 8, 0.9


def train() -> None:
    """A process of a pair: after each line on stdin it makes `STEPS` steps and says how many seconds they took."""
    import torch

    from ssl_ae import distributed
    from ssl_ae import recipe as recipes
    from ssl_ae.data.card import Card, X
    from ssl_ae.data.loading import Feed, Scaling, Table
    from ssl_ae.model import build
    from ssl_ae.plan import pretraining
    from ssl_ae.registry import Registry
    from ssl_ae.resolve import resolve
    from ssl_ae.stages.workspace import no_denormals
    from ssl_ae.training import Trainer, micro_batches
    from tests.benchmarks.rows.vae_step import MODEL
    from tests.benchmarks.training_sides import images

    x = images()
    card = Card(name="bench", x=X(kind="image", dtype="uint8", shape=x.shape[1:], range=(0, 255)), splits={})
    with no_denormals(), distributed.process_group("cpu") as device:
        world = distributed.world()
        training = {"epochs": 10_000, "batch_size": BATCH // (RANKS // world)}
        tree = {"name": "bench", "data": {"path": "."}, "model": MODEL, "pretrain": training}
        resolved = resolve(recipes.parse(tree), Registry.discover(), card)
        torch.manual_seed(0)
        model = build(resolved, head=False)
        scaling = Scaling(card.x, resolved.scale)
        feed = Feed(Table(x), None, scaling, seed=0, device=device, residency="resident", rank=distributed.rank(), world=world)
        training = resolved.recipe.pretrain
        trainer = Trainer(model, pretraining(resolved, model, len(x)), feed, training, seed=0, device=device)
        run = trainer.runs[0]
        batches = feed.batches((run.phase.draw, k) for k in count())
        for _ in sys.stdin:
            started, spent = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                trainer.make_step(run, micro_batches(next(batches), 1))
                trainer.progress.step += 1
                if trainer.progress.step % training.log_every == 0:
                    trainer._read()
            print(time.perf_counter() - started, time.process_time() - spent, flush=True)


class Pair:
    """Two processes that train at the same time: as ranks of one training, or each by itself."""

    def __init__(self, together: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in range(RANKS):
            own = {"WORLD_SIZE": str(RANKS), "RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} if together else {}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.benchmarks.ranks", "--train"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
                )
            )

    def turn(self) -> tuple[float, float]:
        """Seconds until both have made their steps, and processor seconds of both."""
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [map(float, process.stdout.readline().split()) for process in self.processes]
        seconds, spent = zip(*told, strict=True)
        return max(seconds), sum(spent)

    def close(self) -> None:
        for process in self.processes:  # all of them, before the first is gone: ranks leave together
            process.stdin.close()
        for process in self.processes:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train()
        return
    if usable_cores() < RANKS:
        print(f"two ranks: skipped, {RANKS} ranks need as many cores")
        return
    together, alone = Pair(together=True), Pair(together=False)
    for pair in (together, alone) * 2:
        pair.turn()  # warms up
    rounds = [(together.turn(), alone.turn()) for _ in range(given.rounds)]
    for pair in (together, alone):
        pair.close()
    for name, turns in zip(("two ranks", "two processes"), zip(*rounds, strict=True), strict=True):
        print(f"{name}: {BATCH * STEPS / statistics.median(seconds for seconds, _ in turns):,.0f} rows/s")
    speed, spread = middle(one / both for (both, _), (one, _) in rounds)
    print(f"throughput, ranks / processes: {speed:.3f} ± {spread:.3f}; bar >= {BAR}: {'met' if speed >= BAR else 'NOT met'}")
    print("processor time, ranks / processes: {:.3f} ± {:.3f}".format(*middle(both / one for (_, both), (_, one) in rounds)))


def middle(ratios: Iterable[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, (high - low) / 2


if __name__ == "__main__":
    main()
