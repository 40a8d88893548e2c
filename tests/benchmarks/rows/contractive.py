"""What the contractive penalty |dz/dx|_F^2 adds to a training step: ours in closed form, and by vmap(jacrev) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Row

CODE = 128
BATCHES = (128, 1024)
BY_JACREV = 128  # the batch that vmap(jacrev) is shown at: it holds B K D numbers


def model(widths: list[int], penalty: bool) -> dict[str, Any]:
    """Sigmoid layers; with one layer the code is it, with two the code is linear."""
    encoder = {"name": "mlp", "widths": widths, "activation": "sigmoid"}
    if not widths:
        encoder["code_activation"] = "sigmoid"
    return {
        "latent_dim": CODE,
        "encoder": encoder,
        "decoder": {"name": "mlp", "likelihood": "bernoulli"},
        "regularizers": [{"name": "contractive", "weight": 0.1}] if penalty else [],
    }


class ByJacrev(nn.Module):
    """One sigmoid layer, and its Jacobian as the textbook writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(sides.PIXELS, CODE), nn.Sigmoid())
        self.decoder = nn.Linear(CODE, sides.PIXELS)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Nats per row."""
        x = x.flatten(1)
        rebuilt = F.binary_cross_entropy_with_logits(self.decoder(self.encoder(x)), x, reduction="sum")
        weights = dict(self.encoder.named_parameters())
        jacobian = vmap(jacrev(lambda row: functional_call(self.encoder, weights, row)))(x)  # (B, K, D)
        return (rebuilt + 0.1 * jacobian.square().sum()) / len(x)


def rows() -> Iterator[Row]:
    for layers, widths, factors in (("one layer", [], (1.2, 1.2)), ("two layers", [sides.HIDDEN], (None, 1.5))):
        for batch, factor in zip(BATCHES, factors, strict=True):
            found = {
                "ours": sides.ours(model(widths, penalty=True), batch),
                "without the penalty": sides.ours(model(widths, penalty=False), batch),
            }
            if not widths and batch == BY_JACREV:
                found["vmap(jacrev)"] = sides.plain(ByJacrev, batch)
            yield Row(
                metric=f"contractive step, {layers}, K = {CODE}, batch {batch}",
                unit="ms",
                sides=found,
                bars=(Bar("without the penalty", factor),) if factor else (),
            )
