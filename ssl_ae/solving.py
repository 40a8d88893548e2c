"""The minimum of l_Y of a convex head: L-BFGS (Liu & Nocedal 1989) over all labels at once, in whitened coordinates.

    f(W, b) = 1/N sum_n weight_n l_Y(n) + weight_decay/2 |W|_F^2

over the N labelled rows, which is what steps of sgd or adam with that weight decay approach; b does not decay. Latents differ in
variance by orders of magnitude and L-BFGS would need hundreds of passes for that alone. With W = V T and T (C + 2 weight_decay I)
T' = I, C the latents' covariance, the Hessian in V is at most I/2 for the softmax (Böhning 1992, sec. 3), and some twenty do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_ae.components import Head
from ssl_ae.errors import NonFiniteError
from ssl_ae.objective import supervised
from ssl_ae.recipe import Solver
from ssl_ae.trace import Batch, Trace

PART = 2**18  # numbers of W z + b held at once: memory stays bounded, and they stay in the processor's cache
RIDGE = 1e-6  # of a latent's variance, added before T is formed: latents that depend on one another keep a finite T
SINGLE = 1e-4  # the smallest tolerance that float32 reaches whatever the latents; below it float64 computes, at twice the cost
MEMORY = 20  # pairs of steps and gradients that L-BFGS remembers


@dataclass(frozen=True)
class Minimum:
    """Where the solver stopped."""

    value: float  # f, nats a row
    gradient: float  # largest entry of f's gradient in V and b, nats a row
    passes: int  # over the labels
    converged: bool  # the gradient is within the tolerance
    attained: bool  # False: f still falls when W and b grow, so that it has no minimum
    reason: str  # why it stopped, in scipy's words


class WholeObjective:
    """f and its gradient as functions of V and b, flat (outputs * (K + 1),) float64."""

    def __init__(self, head: Head, batch: Batch, weight_decay: float, dtype: torch.dtype) -> None:
        self.head, self.weight_decay = head, weight_decay
        z = batch.x.to(dtype)
        self.mean = z.mean(0)
        z = z - self.mean
        self.whitener = whitener(z, weight_decay, constant(batch.x))
        self.rows, self.outputs = len(z), head.affine().out_features
        self.parts = _parts(batch, z, max(1, PART // self.outputs))
        # a sum in float32 would move by as much as the last passes gain; not every device has float64
        self.exact = torch.float32 if z.device.type == "mps" else torch.float64

    @property
    def size(self) -> int:
        return self.outputs * (len(self.mean) + 1)

    @torch.no_grad()
    def __call__(self, flat: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Mean l_Y, f, and f's gradient."""
        weight, bias = self._unpacked(flat)
        total = torch.zeros((), dtype=self.exact, device=weight.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for part in self.parts:
            # (outputs, n): the classes of a row far apart, so that a softmax runs along the rows
            p_y = self.head.output(torch.addmm(bias, weight, part.x.T).T)
            total += supervised(Trace(model=self.head, batch=part, p_y=p_y)).sum(dtype=self.exact)
            by_raw = self.head.gradient(p_y, part).T
            by_weight += by_raw @ part.x
            by_bias += by_raw.sum(1, keepdim=True)
        by_weight = by_weight / self.rows + self.weight_decay * weight
        gradient = torch.cat([by_weight @ self.whitener.T, by_bias / self.rows], 1).flatten().cpu().double().numpy()
        supervision = float(total) / self.rows
        return supervision, supervision + self.weight_decay / 2 * float(weight.square().sum()), gradient

    @torch.no_grad()
    def write(self, flat: np.ndarray) -> None:
        """Into the head, whose features are the latents as they are stored."""
        weight, bias = self._unpacked(flat)
        affine = self.head.affine()
        affine.weight.copy_(weight)
        affine.bias.copy_(bias[:, 0] - weight @ self.mean)

    def _unpacked(self, flat: np.ndarray) -> tuple[Tensor, Tensor]:
        """W (outputs, K) and the bias of centred latents (outputs, 1)."""
        v = torch.from_numpy(flat).to(self.mean.dtype).to(self.mean.device).view(self.outputs, -1)
        return v[:, :-1] @ self.whitener, v[:, -1:]


def solve(
    head: Head,
    batch: Batch,
    options: Solver,
    weight_decay: float = 0.0,
    told: Callable[[int, float, float], None] = lambda passes, supervision, gradient: None,
) -> Minimum:
    """Set W and b of a convex head to the minimum of f. `batch` holds the labelled rows alone, x (N, K) their latents.

    `told` hears of each pass over the rows: its number from 1, mean l_Y, the gradient's largest entry. Computes on the latents'
    device. Raises NonFiniteError for latents that are not finite.
    """
    from scipy.optimize import minimize  # a fifth of a second, which only those who solve should wait for

    double = options.tolerance < SINGLE and batch.x.device.type != "mps"  # which has no float64
    objective = WholeObjective(head, batch, weight_decay, torch.float64 if double else batch.x.dtype)
    passes = 0

    def one_pass(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal passes
        supervision, value, gradient = objective(flat)
        passes += 1
        told(passes, supervision, float(np.abs(gradient).max()))
        return value, gradient

    limits = {"maxiter": options.max_passes, "maxfun": options.max_passes}
    found = minimize(
        one_pass,
        np.zeros(objective.size),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": options.tolerance, "ftol": 0.0, "maxcor": MEMORY, **limits},
    )
    objective.write(found.x)
    gradient = float(np.abs(found.jac).max())
    attained = weight_decay > 0 or objective(2 * found.x)[1] >= found.fun
    return Minimum(float(found.fun), gradient, passes, gradient <= options.tolerance, attained, str(found.message).strip(" :"))


def whitener(z: Tensor, weight_decay: float, constant: Tensor) -> Tensor:
    """T (K, K) with T (z'z / N + 2 weight_decay I) T' = I, z (N, K) centred; its columns are 0 for `constant` (K,) latents.

    Cholesky, after scaling each latent by its own deviation: a ratio of 1e10 between two variances costs no digits.
    """
    covariance = (z.T @ z / len(z)).cpu().double()
    if not covariance.isfinite().all():
        raise NonFiniteError("the stored latents hold values that are not finite, so no head can be fitted. Extract them again.")
    eye = torch.eye(len(covariance), dtype=torch.float64)
    curvature = covariance + 2 * weight_decay * eye
    constant = constant.cpu()
    scale = torch.where(constant, 1.0, curvature.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt())
    scaled = curvature / scale / scale[:, None] + RIDGE * eye
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(scaled), eye, upper=False) / scale
    return inverse.masked_fill(constant, 0.0).to(z.dtype).to(z.device)


def constant(z: Tensor) -> Tensor:
    """(K,) bool: latents that vary by no more than rounding; a weight on them would only be another bias."""
    low, high = z.aminmax(dim=0)
    return high - low <= 4 * torch.finfo(z.dtype).eps * torch.maximum(low.abs(), high.abs())


def _parts(batch: Batch, z: Tensor, rows: int) -> list[Batch]:
    """The rows in stretches, as views, with x the centred latents."""
    fields = {**vars(batch), "x": z, "target": z}
    for name, value in fields.items():  # as exact as the codes: a density rounded to float32 would end the search early
        if value is not None and value.is_floating_point():
            fields[name] = value.to(z.dtype)
    return [
        Batch(**{name: None if value is None else value[start : start + rows] for name, value in fields.items()})
        for start in range(0, len(z), rows)
    ]
