"""|dE[z|x]/dx|_F^2 per row: in closed form for chains of one or two affine maps with activations, by autograd for any map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution
from torch.utils.checkpoint import checkpoint

from ssl_ae_builtins.activations import Activation

MOST_NUMBERS = 2**24  # kept at once for the gradient of one penalty, beyond the weights: 64 MiB of float32

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, as torch rounds them

# f'(s) from f(s), with torch's choice at a kink. Activations that are no function of their own value are not here.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda f: f * (1 - f),
    "tanh": lambda f: 1 - f.square(),
    "relu": lambda f: (f > 0).to(f.dtype),
    "leaky_relu": lambda f: torch.where(f > 0, torch.ones_like(f), 0.01),
    "elu": lambda f: torch.where(f > 0, 1.0, f + 1),
    "celu": lambda f: torch.where(f > 0, 1.0, f + 1),
    "selu": lambda f: torch.where(f > 0, SELU_SCALE, f + SELU_SCALE * SELU_ALPHA),
    "softplus": lambda f: -torch.expm1(-f),
    "softsign": lambda f: (1 - f.abs()).square(),
    "hardtanh": lambda f: (f.abs() < 1).to(f.dtype),
}

Affine = tuple[Tensor, Activation, Tensor]  # W (out, in), f, and the layer f(W h + b) (B, out) of an undisturbed pass


def of_chain(maps: Sequence[Affine]) -> Tensor | None:
    """|J|_F^2 of x -> f1(W1 x + b1) -> f2(W2 h + b2), per row, (B,); None for more maps, or slopes that layers do not show.

    One map:   sum_k f'(s_k)^2 |w_k|^2, which for the identity is |W|_F^2 in every row.
    Two maps:  d' (W1 W1' o W2' W2) d with d = f1'(s) where the code is affine; else sum_k f2'(s_k)^2 |(w2_k o d) W1|^2.
    The layers must be those of the map itself, without noise: their slopes are where the derivative is taken.
    """
    if not 1 <= len(maps) <= 2 or any(act != "identity" and act not in SLOPES for _, act, _ in maps):
        return None
    slopes = [None if act == "identity" else SLOPES[act](layer.flatten(1)) for _, act, layer in maps]
    if len(maps) == 1 or slopes[0] is None:
        weight = maps[0][0] if len(maps) == 1 else maps[1][0] @ maps[0][0]
        norms = weight.square().sum(1)
        return norms.sum().expand(len(maps[-1][2])) if slopes[-1] is None else slopes[-1].square() @ norms
    first, second = maps[0][0], maps[1][0]
    if slopes[1] is None and _gram_is_cheaper(first, second, rows=len(slopes[0])):
        return _AffineCode.apply(first, second, slopes[0])
    return _by_units(first, second, slopes[0], slopes[1])


def _gram_is_cheaper(first: Tensor, second: Tensor, rows: int) -> bool:
    """Products of H^2 (D + K + B) against B K H min(D, H)."""
    (hidden, inputs), outputs = first.shape, len(second)
    return hidden * (inputs + outputs + rows) <= rows * outputs * min(inputs, hidden)


class _AffineCode(torch.autograd.Function):
    """sum_k |(w2_k o d) W1|^2 = d' M d of every row of d (B, H), (B,), with M = W1 W1' o W2' W2, (H, H).

    By hand, because M and dM are symmetric: dW1 = 2 (dM o W2' W2) W1, dW2 = 2 W2 (dM o W1 W1') and dd = 2 M d, which the value
    has made already. Autograd makes each product twice, and passes over all rows in between. There is no second derivative.
    """

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, d: Tensor) -> Tensor:
        gram, outer = first @ first.T, second.T @ second
        product = d @ (gram * outer)
        ctx.save_for_backward(first, second, d, gram, outer, product)
        return (product * d).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        first, second, d, gram, outer, product = ctx.saved_tensors
        twice = 2 * slope[:, None].to(product.dtype)
        to_d = product * twice if ctx.needs_input_grad[2] else None
        moment = (d * twice).to(product.dtype).T @ d.to(product.dtype)  # 2 dM; autocast's dtype, which backward has to keep
        return (moment * outer) @ first.to(moment.dtype), second.to(moment.dtype) @ (moment * gram), to_d


def _by_units(first: Tensor, second: Tensor, d1: Tensor, d2: Tensor | None) -> Tensor:
    """sum_k d2_k^2 |(w2_k o d1) W1|^2, (B,), through W1 W1' where H < D."""
    (hidden, inputs), outputs = first.shape, len(second)
    gram = first @ first.T if hidden < inputs and hidden * inputs < len(d1) * outputs * (inputs - hidden) else None

    def part(d1: Tensor, d2: Tensor | None = None) -> Tensor:
        units = second * d1[:, None]  # (B, K, H)
        squares = (units @ first).square().sum(2) if gram is None else ((units @ gram) * units).sum(2)
        return squares.sum(1) if d2 is None else (squares * d2.square()).sum(1)

    return in_parts(part, outputs * (hidden + min(hidden, inputs)), d1, *([] if d2 is None else [d2]))


def in_parts(of: Callable[..., Tensor], numbers: int, *rows: Tensor) -> Tensor:
    """of(*rows), (B,), over so few rows at a time that at most MOST_NUMBERS of their `numbers` a row are kept at once.

    More than one part is computed again for the gradient instead of being kept.
    """
    count = math.ceil(len(rows[0]) * numbers / MOST_NUMBERS)
    if count <= 1:
        return of(*rows)
    parts = zip(*(tensor.chunk(count) for tensor in rows), strict=True)
    return torch.cat([checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def rows_of(encode: Callable[[Tensor], Distribution], x: Tensor) -> Iterator[Tensor]:
    """dE[z_k|x]/dx (B, *shape) for k = 1, ..., K, by one vector-Jacobian product each; rows of x must not know each other.

    They have a graph of their own where gradients are enabled.
    """
    return _rows_of(encode, x.detach().requires_grad_(), torch.is_grad_enabled())


@torch.enable_grad()
def _rows_of(encode: Callable[[Tensor], Distribution], x: Tensor, create_graph: bool) -> Iterator[Tensor]:
    mean = encode(x).mean
    for k in range(mean.shape[1]):
        yield torch.autograd.grad(mean[:, k].sum(), x, create_graph=create_graph, retain_graph=True)[0]


def by_autograd(encode: Callable[[Tensor], Distribution], x: Tensor, numbers: int) -> Tensor:
    """|dE[z|x]/dx|_F^2 per row, (B,), differentiable; a pass through `encode` makes `numbers` numbers a row."""

    def part(x: Tensor) -> Tensor:
        return torch.stack([row.flatten(1).square().sum(1) for row in rows_of(encode, x)]).sum(0)

    return in_parts(part, numbers, x)
