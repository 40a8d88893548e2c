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
COARSE = 16  # pixels from which on every second one along each axis is looked at: their contexts overlap
AT_ONCE = 2**17  # numbers of a batch of candidates, per shift: more would not stay near


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
    return torch.cat([conv2d(gradients(part), kernels, padding=CONTEXT // 2) for part in images.split(LEARNT_FROM)])


def bent(found: Tensor, near: Tensor, window: int, step: int) -> Tensor:
    """Squared distances (N, M) of maps (N, c, H, W) at every `step`-th pixel to those of rows near (N, M), bent to fit."""
    looked_at = found[..., ::step, ::step]
    padded = pad(found, (window,) * 4)
    # The pixels that a shift reads, every step-th one, lie together: those of its phase. Rows of pixels are laid end to end, so
    # that a shift is a place to begin at, and what it reads is one run of numbers; where a run goes on behind the end of a row
    # of the image there is nothing to compare, and the sum leaves it out.
    phases = {at: padded[..., at[0] :: step, at[1] :: step] for at in product(range(step), repeat=2)}
    wide = max(each.shape[3] for each in phases.values())
    phases = {at: pad(each, (0, wide - each.shape[3])).flatten(2).contiguous() for at, each in phases.items()}
    height, width = looked_at.shape[2:]
    run = (height - 1) * wide + width
    own = pad(looked_at, (0, wide - width)).flatten(2)[..., :run].contiguous()
    inside = pad(found.new_ones(height, width), (0, wide - width)).flatten()[:run]
    squares = found.new_empty(near.shape)
    for rows in torch.arange(len(found)).split(max(1, AT_ONCE // (own[0].numel() * near.shape[1]))):
        others = {at: each[near[rows]] for at, each in phases.items()}
        here, least = own[rows][:, None], None
        for down, across in product(range(2 * window + 1), repeat=2):
            start = down // step * wide + across // step
            apart = (here - others[down % step, across % step][..., start : start + run]).square_().sum(2)
            least = apart if least is None else torch.minimum(least, apart, out=least)
        squares[rows] = least @ inside
    return squares
