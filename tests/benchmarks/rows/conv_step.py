"""A training step of a small convolutional autoencoder in float32: against the loop, and against its convolutions alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Row, Side

MODEL = {"latent_dim": sides.LATENT, "encoder": {"name": "conv", "channels": [32, 64]}, "decoder": {"name": "conv"}}
BATCH = 128


def laid(x: torch.Tensor) -> torch.Tensor:
    """As oneDNN convolves fastest."""
    return x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)


def operations(batch: int, dtype: torch.dtype = torch.float32) -> Side:
    """Every convolution and matrix product of a step, forward and backward, on operands that lie ready, channels innermost."""
    model = sides.ConvAutoencoder().to(dtype)
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
    met: list[tuple[torch.nn.Module, torch.Tensor]] = []
    hooks = [m.register_forward_hook(lambda m, x, y: met.append((m, x[0]))) for m in model.modules() if isinstance(m, kinds)]
    model.decoder(model.encoder(sides.inputs()[:batch].to(dtype)))
    for hook in hooks:
        hook.remove()
    layers = [(layer, laid(x.detach()).requires_grad_(i > 0)) for i, (layer, x) in enumerate(met)]  # images need no gradient
    slopes = [laid(torch.randn_like(layer(x))) for layer, x in layers]

    def step() -> None:
        for (layer, x), slope in zip(layers, slopes, strict=True):
            wanted = [layer.weight, x] if x.requires_grad else [layer.weight]
            torch.autograd.grad(layer(x), wanted, slope)

    return Side(step)


def rows() -> Iterator[Row]:
    yield Row(
        metric=f"small conv autoencoder, 32-64 channels, fp32, batch {BATCH}",
        unit="ms",
        sides={
            "ours": sides.ours(MODEL, BATCH),
            "limit": operations(BATCH),
            "plain loop": sides.plain(sides.ConvAutoencoder, BATCH),
        },
        bars=(Bar("plain loop", 1.0),),
        note="limit: the step's convolutions and matrix products alone",
    )
