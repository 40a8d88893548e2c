"""The training step of conv_step.py with `precision: bf16`: against ours and the loop in float32, and a loop with autocast."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Missing, Row, why_no_bf16
from tests.benchmarks.rows.conv_step import BATCH, MODEL, operations


def rows() -> Iterator[Row]:
    metric = f"small conv autoencoder, 32-64 channels, bf16, batch {BATCH}"
    if reason := why_no_bf16():
        yield Row(metric, "ms", {"ours": Missing(reason)})
        return
    yield Row(
        metric=metric,
        unit="ms",
        sides={
            "ours": sides.ours(MODEL, BATCH, bf16=True),
            "limit": operations(BATCH, torch.bfloat16),
            "ours in fp32": sides.ours(MODEL, BATCH),
            "plain loop in fp32": sides.plain(sides.ConvAutoencoder, BATCH),
            "plain loop in bf16": sides.plain(sides.ConvAutoencoder, BATCH, bf16=True),
        },
        bars=(Bar("ours in fp32", 1 / 1.4), Bar("plain loop in fp32", 1 / 1.4)),
        note="limit: the step's convolutions and matrix products alone, in bf16",
    )
