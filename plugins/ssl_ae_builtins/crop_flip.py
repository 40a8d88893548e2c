"""The usual augmentation of photographs: each is shifted by whole pixels and, at times, mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae
from ssl_ae_builtins.images import check_images, complaints


class CropFlip(ssl_ae.Regularizer):
    """A crop of the image's own size from the padded image, mirrored left to right at odds (He et al. 2016, sec. 4.2).

    There 4 pixels on every side and odds 1/2, on images of 32 x 32. Each row draws its own place, uniformly, and whether
    it is mirrored. The target stays as it was.
    """

    name = "crop_flip"
    of_samples = True

    class Config(ssl_ae.Config):
        padding: int = Field(4, ge=0, description="largest shift along each axis, in whole pixels")
        flip: float = Field(0.5, ge=0, le=1, description="odds that left becomes right; 0 where that changes the class: digits")
        border: Literal["zeros", "border", "reflection"] = Field(
            "zeros", description="what lies outside: 0, the nearest pixel, or the image mirrored at its edge"
        )

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_images(self.name, h, layer)
        rows, channels, height, width = h.shape
        most = self.config.padding
        down, across = torch.randint(-most, most + 1, (2, rows, 1), device=h.device).unbind()
        mirrored = torch.rand(rows, 1, device=h.device) < self.config.flip
        y, x = (torch.arange(size, device=h.device)[None] for size in (height, width))  # (1, H), (1, W)
        y, x = y + down, torch.where(mirrored, width - 1 - x, x) + across
        source = self._inside(y, height)[:, :, None] * width + self._inside(x, width)[:, None, :]  # (B, H, W)
        found = h.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view_as(h)
        if self.config.border != "zeros":
            return found
        there = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        return found.where(there[:, None], 0.0)

    def _inside(self, at: Tensor, size: int) -> Tensor:
        """The pixels of an axis that are read for places at most `size` outside."""
        if self.config.border == "reflection":
            at = torch.where(at < 0, -1 - at, at)
            at = torch.where(at >= size, 2 * size - 1 - at, at)
        return at.clamp(0, size - 1)

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        shape = recipe.shapes.x
        yield from complaints(cls.name, shape, "Remove crop_flip.")
        if len(shape) == 3 and config.padding >= min(shape[1:]):
            yield (
                f"crop_flip.padding = {config.padding}: an image of {shape[1]} x {shape[2]} could be shifted out of sight. "
                f"Set less than {min(shape[1:])}, a tenth of the side, say."
            )
        if not config.padding and not config.flip:
            yield "crop_flip: with padding = 0 and flip = 0 it changes nothing. Set one of them, or remove crop_flip."
