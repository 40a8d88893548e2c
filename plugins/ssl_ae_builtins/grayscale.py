"""Colourisation: a grey picture goes in, the colours come out."""

from __future__ import annotations

import torch
from torch import Tensor

import ssl_ae
from ssl_ae_builtins.images import check_images

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # they add up to 1: a common scaling of the channels stays one, and grey stays as it is


class Grayscale(ssl_ae.Regularizer):
    """Y = 0.299 R + 0.587 G + 0.114 B in all three channels (luma, ITU-R BT.601-7, sec. 2.5.1); the target keeps its colours.

    It says what the input is and is no noise, so it also acts in extract, evaluate, predict and reconstruct: a model that was
    trained on grey pictures meets no colours there either. R, G and B are the gamma-corrected values that image files hold,
    for which luma is defined. With the gaussian likelihood of unit variance l_X is the Euclidean loss of Zhang et al. 2016,
    eq. 1, whose best answer is the mean of all plausible colours: paler than any of them.
    """

    name = "grayscale"
    always = True
    of_samples = True

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W) with equal channels, computed in float32 where h is narrower."""
        check_images(self.name, h, layer, channels=3)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        luma = RED * wide[:, 0:1] + GREEN * wide[:, 1:2] + BLUE * wide[:, 2:3]
        return luma.to(h.dtype).expand_as(h)

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        shape = recipe.shapes.x
        if len(shape) == 3 and shape[0] == 3:
            return []
        return [f"grayscale needs colour images (3, H, W), but a sample has shape {shape}. Remove grayscale."]
