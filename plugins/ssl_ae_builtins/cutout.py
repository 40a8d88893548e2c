"""A square of each image is hidden, so that no single part of it decides."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae
from ssl_ae_builtins.images import check_images, complaints


class Cutout(ssl_ae.Regularizer):
    """A square of zeros around a pixel that each row draws uniformly; the image's edge cuts it (DeVries & Taylor 2017, sec. 3.2).

    There the side is 1/4 to 5/8 of the image's. The target stays as it was: an autoencoder paints in what is hidden. A style
    that differs from others of its class by one part is sometimes seen without that part, and then looks like them.
    """

    name = "cutout"
    of_samples = True

    class Config(ssl_ae.Config):
        side: float = Field(0.5, gt=0, le=1, description="of the square, in sides of the image, along each axis")

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_images(self.name, h, layer)
        down, across = (self._hidden(len(h), size, h.device) for size in h.shape[2:])
        return h.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)

    def _hidden(self, rows: int, size: int, device: torch.device) -> Tensor:
        """Which pixels of an axis of `size` the square covers, (rows, size) bool."""
        width = max(1, round(self.config.side * size))
        first = torch.randint(size, (rows, 1), device=device) - width // 2
        at = torch.arange(size, device=device)
        return (at >= first) & (at < first + width)

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        return complaints(cls.name, recipe.shapes.x, "Remove cutout, or take masking_noise.")
