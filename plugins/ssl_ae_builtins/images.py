"""What plugins for images ask of a sample, or of a layer, and how lengths in pixels go from one size of image to another."""

from __future__ import annotations

from torch import Tensor

from ssl_ae.errors import RecipeError


def complaints(name: str, shape: tuple[int, ...], cure: str) -> list[str]:
    """Where samples of this shape are no images."""
    return [] if len(shape) == 3 else [f"{name} needs images (C, H, W), but a sample has shape {shape}. {cure}"]


def pixel_scale(shape: tuple[int, ...], side: int | None) -> float:
    """How many pixels of images (C, H, W) are as long as one of images whose shorter side is `side`; 1 for None."""
    return 1.0 if side is None else min(shape[1:]) / side


def check_images(name: str, h: Tensor, layer: str, channels: int | None = None) -> None:
    """Raises RecipeError where h is not (B, C, H, W), or has another number of channels than the one asked for."""
    if h.dim() != 4 or channels not in (None, h.shape[1]):
        raise RecipeError(
            f"{name}.layers: layer {layer!r} has shape {tuple(h.shape[1:])} a row, not ({channels or 'C'}, H, W). "
            "Leave `layers` out."
        )
