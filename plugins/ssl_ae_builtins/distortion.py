"""Geometric corruption of images: each row is moved, turned, stretched and bent in its own way."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae
from ssl_ae_builtins.images import check_images, complaints, pixel_scale

REACH = 4  # standard deviations at which the smoothing kernel ends
LOST = 1e-4  # largest part of a pixel's variance that the modes left out of the elastic field would have added


class Distortion(ssl_ae.Regularizer):
    """x~(p) = x(A^-1 (p - t) + d(p)), A = rotation * shear * scale, d = alpha * G_sigma * noise (Simard et al. 2003, sec. 2).

    p is a place in pixels from the centre of the image, x is read there bilinearly. Every row draws its own A, t and d; each
    number of A and t is uniform between minus and plus its option, heights and widths apart. The noise has one number of
    variance 1/3 for every pixel and axis, as U(-1, 1) has, and G_sigma is a Gaussian kernel of sum 1: d has alpha / (2 sqrt(3
    pi) sigma) pixels of standard deviation for sigma of a pixel and more. Simard et al. use alpha = 34 and sigma = 4 on images
    of 29 x 29, and uniform noise; ours is normal (until version 2 it was uniform), so that few numbers make a field of the same
    means and covariances. With `side`, t and d are scaled to the image: `side: 28` distorts one of 8 x 8 pixels as much as one
    of 28 x 28, seen from as far as makes them equally large. The target stays undistorted.
    """

    name = "distortion"
    version = 2
    upgrades_from = frozenset({1})  # it has no weights
    of_samples = True

    class Config(ssl_ae.Config):
        rotation: float = Field(10.0, ge=0, le=180, description="largest angle, in degrees")
        translation: float = Field(1.0, ge=0, description="largest shift along each axis, in pixels")
        log_scale: float = Field(0.1, ge=0, le=2, description="largest |log| of the factor of height and of width: 0.1 is 10 %")
        shear: float = Field(5.0, ge=0, lt=90, description="largest angle by which upright lines lean, in degrees")
        alpha: float = Field(34.0, ge=0, description="strength of the elastic displacement, in pixels before smoothing")
        sigma: float = Field(4.0, gt=0, description="standard deviation of the smoothing, in pixels: larger bends more gently")
        side: int | None = Field(
            None,
            ge=1,
            description="pixels along the shorter side of the images that translation, alpha and sigma are meant for: on others "
            "the same relative distortion; default: the images' own",
        )
        border: Literal["zeros", "border", "reflection"] = Field(
            "zeros",
            description="what lies outside: 0 (right on a background of 0), the nearest pixel, or the image mirrored",
        )

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self._sizes = tuple(shapes.x[1:])
        self._unit = pixel_scale(shapes.x, config.side)
        # a displacement has alpha / sigma pixels, times a constant, and sigma of them are alike
        self._alpha, self._sigma = config.alpha * self._unit**2, config.sigma * self._unit
        if config.alpha:  # on the device beforehand: a step that sends them there would wait
            for axis, size in zip(("down", "across"), self._sizes, strict=True):
                self.register_buffer(axis, modes(size, self._sigma).float(), persistent=False)

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), computed in float32 where h is narrower."""
        check_images(self.name, h, layer)
        with torch.autocast(h.device.type, enabled=False):
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            linear, shift = self._affine(wide)
            bend = self._bend(wide) if self.config.alpha else None
            return warp(wide, linear, shift, bend, self.config.border).to(h.dtype)

    def _bend(self, x: Tensor) -> Tensor:
        """d (B, 2, H, W)."""
        if tuple(x.shape[2:]) != self._sizes:  # a layer of feature maps
            return displacements(x, self._alpha, *(modes(size, self._sigma) for size in x.shape[2:]))
        return displacements(x, self._alpha, self.down, self.across)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (B, 2, 2) and t (B, 2)."""
        angle, shear, *rest = x.new_empty(6, len(x)).uniform_(-1, 1).unbind()
        config = self.config
        scale = torch.stack(rest[:2], dim=1) * config.log_scale
        linear = affine(angle * math.radians(config.rotation), shear * math.radians(config.shear), scale)
        return linear, torch.stack(rest[2:], dim=1) * (config.translation * self._unit)

    @classmethod
    def upgrade(cls, version: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        return complaints(cls.name, recipe.shapes.x, "Remove distortion.")


def affine(angle: Tensor, shear: Tensor, log_scale: Tensor) -> Tensor:
    """Rotation * shear * scale over (x to the right, y downwards), (B, 2, 2); angles in radians (B,), log_scale (B, 2).

    A positive angle turns counter-clockwise as one looks at the image; a positive shear leans what is below to the right.
    """
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rotation = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    lean = torch.stack([one, shear.tan(), zero, one], dim=1).view(-1, 2, 2)
    return rotation @ lean @ torch.diag_embed(log_scale.exp())


def displacements(x: Tensor, alpha: float, down: Tensor, across: Tensor) -> Tensor:
    """Smooth random fields for images x (B, C, H, W) from the modes of each axis: (B, 2, H, W) in pixels, x before y."""
    down, across = down.to(x), across.to(x)
    noise = torch.randn(len(x), 2, down.shape[1], across.shape[1], device=x.device, dtype=x.dtype)
    return (alpha * 3**-0.5 * down) @ noise @ across.mT


def modes(size: int, sigma: float) -> Tensor:
    """M (size, R), float64, with M M' = S S': M applied to R normal numbers is S applied to size + 2r of them, in distribution.

    S smooths noise along an axis. It leaves little of what changes from pixel to pixel, so few modes carry all but LOST of
    each pixel's variance: 9 of 28 pixels for sigma = 4.
    """
    kernel = smoothing(size, sigma)
    covariance = kernel @ kernel.mT
    values, vectors = torch.linalg.eigh(covariance)
    found = vectors.flip(1) * values.flip(0).clamp_min(0).sqrt()  # the largest first
    kept = (found.square().cumsum(1) / covariance.diag()[:, None]).amin(0)
    return found[:, : int((kept < 1 - LOST).sum()) + 1]


def smoothing(size: int, sigma: float) -> Tensor:
    """S (size, size + 2r), float64: row i is the Gaussian kernel about i + r, r = REACH sigma, normalised to sum 1.

    The noise goes on beyond the borders, so that a displacement there has the same distribution as in the middle.
    """
    reach = math.ceil(REACH * sigma)
    places = torch.arange(size + 2 * reach, dtype=torch.float64)
    apart = places - places[reach : size + reach, None]
    kernel = torch.where(apart.abs() <= reach, (-0.5 * (apart / sigma).square()).exp(), 0.0)
    return kernel / kernel.sum(1, keepdim=True)


def warp(x: Tensor, linear: Tensor, shift: Tensor, bend: Tensor | None = None, border: str = "zeros") -> Tensor:
    """x (B, C, H, W) read bilinearly at linear^-1 (p - shift) + bend(p) for every pixel p, so that p goes to linear p + shift.

    linear (B, 2, 2), shift (B, 2), bend (B, 2, H, W), all in pixels, x (to the right) before y (downwards), about the centre.
    """
    height, width = x.shape[2:]
    (a, b), (c, d) = (row.unbind(1) for row in linear.unbind(1))
    inverse = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]
    at = torch.cat([inverse, -(inverse @ shift[:, :, None])], dim=2) @ pixels(x)  # (B, 2, H W)
    at = at.unflatten(2, (height, width))
    if bend is not None:
        at += bend  # in place, here and below: on a CPU fresh memory costs more than what is done to it
    # grid_sample's coordinates go from -1 to 1 over each side; filled on the device, where copying a list would wait for it
    unit = torch.stack([x.new_full((), 2 / width), x.new_full((), 2 / height)])[:, None, None]
    at *= unit
    return nn.functional.grid_sample(x, at.permute(0, 2, 3, 1), "bilinear", border, align_corners=False)


def pixels(x: Tensor) -> Tensor:
    """(3, H W): the places of the pixels of images (B, C, H, W) from the centre, x before y, and 1."""
    height, width = x.shape[2:]
    across = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    down = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    return torch.stack([across.repeat(height), down.repeat_interleave(width), across.new_ones(height * width)])
