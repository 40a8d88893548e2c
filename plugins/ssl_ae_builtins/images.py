"""What corruptions of images ask of a layer."""

from __future__ import annotations

from torch import Tensor

from ssl_ae.errors import RecipeError


def check_images(name: str, h: Tensor, layer: str, channels: int | None = None) -> None:
    """Raises RecipeError where h is not (B, C, H, W), or has another number of channels than the one asked for."""
    if h.dim() != 4 or channels not in (None, h.shape[1]):
        raise RecipeError(
            f"{name}.layers: layer {layer!r} has shape {tuple(h.shape[1:])} a row, not ({channels or 'C'}, H, W). "
            "Leave `layers` out."
        )
