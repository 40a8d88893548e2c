"""A training step of a small VAE, 784-512-16 and back, in float32: against loops, and against its matrix products alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Row, Side, peer

MODEL = {
    "latent_dim": sides.LATENT,
    "encoder": {"name": "mlp", "widths": [sides.HIDDEN], "posterior": "diag"},
    "decoder": {"name": "mlp", "likelihood": "bernoulli"},
    "regularizers": [{"name": "kl"}],
}
BARS = {128: 1.35, 1024: 1.12}


def products(batch: int, hidden: int = sides.HIDDEN, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Side:
    """Every matrix product of a step, forward and backward, on operands that are there already."""
    sizes = [(sides.PIXELS, hidden), (hidden, 2 * sides.LATENT), (sides.LATENT, hidden), (hidden, sides.PIXELS)]
    layers = [[torch.randn(*size, device=device).to(dtype) for size in ((batch, n), (m, n), (batch, m))] for n, m in sizes]

    @torch.no_grad()
    def step() -> None:
        for i, (x, weight, gradient) in enumerate(layers):
            x @ weight.T  # forward
            gradient.T @ x  # to the weights
            if i:  # the images need no gradient
                gradient @ weight

    return Side(step)


def rows() -> Iterator[Row]:
    for batch, factor in BARS.items():
        yield Row(
            metric=f"VAE step, MLP 784-512-16, fp32, batch {batch}",
            unit="ms",
            sides={
                "ours": sides.ours(MODEL, batch),
                "limit": products(batch),
                "plain loop": sides.plain(sides.Vae, batch),
                **peer("pythae", lambda batch=batch: sides.pythae_vae(batch)),
                **peer("lightning", lambda batch=batch: sides.lightning_vae(batch)),
            },
            bars=(Bar("limit", factor),),
            note="limit: the step's matrix products alone",
        )
