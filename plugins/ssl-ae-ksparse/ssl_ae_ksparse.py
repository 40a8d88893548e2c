"""k-sparse autoencoder (Makhzani & Frey 2013, arXiv:1312.5663) for ssl-ae."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae


class KSparse(ssl_ae.Encoder):
    """z = V x + b with all but the k largest activations of each row set to 0 (Makhzani & Frey 2013, sec. 2.1)."""

    name = "ksparse"

    class Config(ssl_ae.Config):
        k: int = Field(25, ge=1, description="active units of each row, at most latent_dim")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.linear = nn.Linear(math.prod(shapes.x), shapes.latent)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point with at most k non-zeros a row, (B, K)."""
        h = run.tap(self.linear(x.flatten(1)), "h1")
        top = h.topk(self.config.k, dim=1)
        return ssl_ae.Point(torch.zeros_like(h).scatter(1, top.indices, top.values))

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        if config.k > recipe.shapes.latent:
            yield (
                f"model.encoder.k = {config.k}: at most model.latent_dim = {recipe.shapes.latent} units can be active. "
                "Lower k or raise latent_dim."
            )


@ssl_ae.hookimpl
def ssl_ae_encoders() -> list[type[ssl_ae.Encoder]]:
    return [KSparse]
