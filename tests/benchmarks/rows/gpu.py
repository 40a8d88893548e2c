"""On a GPU: a small VAE, whose kernels take longer to launch than to compute; a wide one, which computes; and extraction.

Counted in seconds of the clock, from an idle device to an idle device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from ssl_ae.stages import extract
from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Missing, Row, Side, peer
from tests.benchmarks.rows import vae_step

BATCH, WIDE_BATCH, WIDE = 256, 8192, 8192


def by_the_clock(side: Side) -> Side:
    """The same work, counted until the device has done it."""

    def work() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        side.work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return Side(work, side.amount)


def sides_of(makers: Mapping[str, Callable[[], Side]]) -> dict[str, Side | Missing]:
    if not torch.cuda.is_available():
        return {name: Missing("no GPU") for name in makers}
    return {name: by_the_clock(make()) for name, make in makers.items()}


def pythae() -> dict[str, Side | Missing]:
    if not torch.cuda.is_available():
        return {"pythae": Missing("no GPU")}
    return peer("pythae", lambda: by_the_clock(sides.pythae_vae(BATCH, torch.device("cuda"))))


def wide(width: int) -> dict:
    return {**vae_step.MODEL, "encoder": {**vae_step.MODEL["encoder"], "widths": [width]}}


def extraction() -> Side:
    """Codes of every row, as the extract stage makes them, from rows on the device to numbers on the host."""
    trainer = sides.trainer_of(vae_step.MODEL, BATCH, bf16=False, device=torch.device("cuda"))
    rows = np.arange(sides.ROWS)

    def work() -> None:
        extract.encode(trainer.model, trainer.feed, rows, lambda model, batch: {"latent": model.features(batch.x)})

    return Side(work, amount=sides.ROWS)


def encoding() -> Side:
    """The encoder's matrix products and the copy of the codes to the host."""
    sizes = [(sides.PIXELS, sides.HIDDEN), (sides.HIDDEN, 2 * sides.LATENT)]
    layers = [(torch.randn(sides.ROWS, n, device="cuda"), torch.randn(m, n, device="cuda")) for n, m in sizes]

    def work() -> None:
        for x, weight in layers:
            code = x @ weight.T
        code[:, : sides.LATENT].cpu()

    return Side(work, amount=sides.ROWS)


def rows() -> Iterator[Row]:
    gpu = torch.device("cuda")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield Row(
        metric=f"{device}: VAE step, MLP 784-512-16, fp32, batch {BATCH}",
        unit="ms",
        sides={**sides_of({"ours": lambda: sides.ours(vae_step.MODEL, BATCH, device=gpu)}), **pythae()},
        bars=(Bar("pythae", 0.1),),
    )
    yield Row(
        metric=f"{device}: VAE step, MLP 784-{WIDE}-16, bf16, batch {WIDE_BATCH}",
        unit="ms",
        sides=sides_of(
            {
                "ours": lambda: sides.ours(wide(WIDE), WIDE_BATCH, bf16=True, device=gpu),
                "limit": lambda: vae_step.products(WIDE_BATCH, WIDE, torch.bfloat16, "cuda"),
            }
        ),
        bars=(Bar("limit", 1 / 0.6),),
        note="limit: the step's matrix products alone",
    )
    yield Row(
        metric=f"{device}: extraction of 784-512-16, fp32",
        unit="rows/s",
        sides=sides_of({"ours": extraction, "limit": encoding}),
        note="limit: the encoder's matrix products and the copy of the codes",
    )
