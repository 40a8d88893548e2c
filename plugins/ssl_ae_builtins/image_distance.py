"""How far apart two images are when each pixel may look for its like near by: the image distortion model."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad, unfold

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
CONTEXT = 3  # pixels along each side of the neighbourhood that is compared
COMPONENTS = 3  # of the contexts that are kept: 0.7 of what handwriting varies by, in a sixth of the time
LEARNT_FROM = 1000  # images
PART = 100  # images whose maps are made together: more would not stay near
COARSE = 16  # pixels from which on every second one along each axis is looked at: their contexts overlap
AT_ONCE = 2**17  # numbers of a batch of candidates, per shift: more would not stay near
AT_ONCE_THERE = 2**24  # on an accelerator, where to begin costs more than to go through so many


def distances(images: Tensor, near: Tensor, window: int) -> Tensor:
    """Squared distances (N, M) of images (N, C, H, W) to their candidates, rows near (N, M).

    sum over pixels p of min over |d| <= window, along each axis, of |c(p) - c'(p + d)|^2, c the 3 x 3 neighbourhood of p in the
    Sobel gradients, 0 outside: the image distortion model, zero-order and with local context (Keysers et al. 2007). The
    candidate is bent, the first image is not, so the distance is not symmetric. For speed, c is projected on its 3 principal
    directions, and of images of 16 pixels and more every second pixel along each axis is looked at.
    """
    found = contexts(images, COMPONENTS)
    return bent(found, near, window, 2 if min(images.shape[2:]) >= COARSE else 1)


def gradients(images: Tensor) -> Tensor:
    """Sobel's, (N, C, H, W) -> (N, 2 C, H, W): across, then down, of each channel; the border is repeated."""
    kernels = torch.stack([SOBEL, SOBEL.mT])[:, None].to(images)
    padded = pad(images.flatten(0, 1)[:, None], (1,) * 4, mode="replicate")
    return conv2d(padded, kernels).view(len(images), -1, *images.shape[2:])


def contexts(images: Tensor, components: int) -> Tensor:
    """The gradients about each pixel, in their principal directions: (N, components, H, W), or as many as there are."""
    some = gradients(images[:: -(-len(images) // LEARNT_FROM)])
    seen = unfold(some, CONTEXT, padding=CONTEXT // 2).transpose(1, 2).flatten(0, 1)  # (n H W, 9 * 2 C)
    directions = torch.linalg.eigh(seen.mT @ seen)[1].flip(1)[:, :components]
    kernels = directions.mT.reshape(-1, some.shape[1], CONTEXT, CONTEXT)
    found = images.new_empty(len(images), len(kernels), *images.shape[2:])
    for part, maps in zip(images.split(PART), found.split(PART), strict=True):
        maps.copy_(conv2d(gradients(part), kernels, padding=CONTEXT // 2))
    return found


def bent(found: Tensor, near: Tensor, window: int, step: int) -> Tensor:
    """Squared distances (N, M) of maps (N, c, H, W) at every `step`-th pixel to those of rows near (N, M), bent to fit."""
    phases = laid_out(found, window, step)
    wide = phases[0, 0].shape[3]
    phases = {at: each.flatten(2) for at, each in phases.items()}
    places = range(2 * window + 1)
    shifts = [((down % step, across % step), down // step * wide + across // step) for down, across in product(places, places)]
    # Rows of pixels lie end to end, so that a shift is a place to begin at, and what it reads is one run of numbers; where a run
    # goes on behind the end of a row of the image there is nothing to compare, and the sum leaves it out.
    height, width = (-(-size // step) for size in found.shape[2:])
    run = (height - 1) * wide + width
    inside = pad(found.new_ones(height, width), (0, wide - width)).flatten()[:run]
    unmoved, begin = shifts[len(shifts) // 2]
    squares = found.new_empty(near.shape)
    most = AT_ONCE if found.device.type == "cpu" else AT_ONCE_THERE
    batches = torch.arange(len(found), device=found.device).split(max(1, most // (found.shape[1] * run * near.shape[1])))
    # one place for the differences of all batches: fresh memory each time costs as much as what is done to it
    held = found.new_empty(len(batches[0]), near.shape[1], found.shape[1], run)
    sums = held.new_empty(2, *held.shape[:2], run)
    for rows in batches:
        own = phases[unmoved][rows][:, None, :, begin : begin + run]
        others = {at: each[near[rows]] for at, each in phases.items()}
        apart, (total, least) = held[: len(rows)], sums[:, : len(rows)]
        least.fill_(torch.inf)
        for at, start in shifts:
            torch.sub(own, others[at][..., start : start + run], out=apart).square_()
            total.copy_(apart[:, :, 0])  # channel by channel, where `sum` over so few takes three times as long
            for channel in apart.unbind(2)[1:]:
                total += channel
            torch.minimum(least, total, out=least)
        squares[rows] = least @ inside
    return squares


def laid_out(found: Tensor, window: int, step: int) -> dict[tuple[int, int], Tensor]:
    """The pixels of maps (N, c, H, W) with `window` zeros around them, every `step`-th one, by where along each axis they begin.

    A shift reads every step-th pixel: here those lie together. Each is as high and wide as the largest, 0 at its ends.
    """
    sizes = [-(-(size + 2 * window) // step) for size in found.shape[2:]]
    phases = {at: found.new_zeros(*found.shape[:2], *sizes) for at in product(range(step), repeat=2)}
    for number, maps in enumerate(found.split(PART)):
        padded = pad(maps, (window,) * 4)
        for (down, across), each in phases.items():
            part = padded[..., down::step, across::step]
            each[number * PART : number * PART + len(part), :, : part.shape[2], : part.shape[3]] = part
    return phases
