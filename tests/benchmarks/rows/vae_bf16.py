"""The training step of vae_step.py with `precision: bf16`: against pythae's in float32, a loop with autocast, and the products.

Whether the codes are as good is the question of tests/benchmarks/bf16_accuracy.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Missing, Row, peer, why_no_bf16
from tests.benchmarks.rows.vae_step import BARS, MODEL, products


def rows() -> Iterator[Row]:
    reason = why_no_bf16()
    for batch in BARS:
        metric = f"VAE step, MLP 784-512-16, bf16, batch {batch}"
        if reason:
            yield Row(metric, "ms", {"ours": Missing(reason)})
            continue
        yield Row(
            metric=metric,
            unit="ms",
            sides={
                "ours": sides.ours(MODEL, batch, bf16=True),
                "limit": products(batch, torch.bfloat16),
                "limit in fp32": products(batch),
                "plain loop in bf16": sides.plain(sides.Vae, batch, bf16=True),
                **peer("pythae", lambda batch=batch: sides.pythae_vae(batch)),
            },
            bars=(Bar("pythae", 1 / 1.7),),
            note="limit: the step's matrix products alone, in bf16; pythae trains in fp32",
        )
