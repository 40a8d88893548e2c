"""LISTA: a network of a few layers that learns to predict sparse codes."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae
from ssl_ae_builtins.sparse_coding import largest_eigenvalue, shrink


class Lista(ssl_ae.Encoder):
    """h <- shrink(We x + c + S h; theta), T times from h = shrink(We x + c; theta) (Gregor & LeCun 2010, alg. 3).

    We, S, c and theta > 0 (one a unit) are learned and shared by the T steps. Minimise l_X + lambda |z|_1 with a linear decoder:
    `sparse_l1` beside it, and `unit_norm`, so that atoms do not grow. T = 0 is one layer with a soft threshold.

    Starts as ISTA (Beck & Teboulle 2009, eq. 1.4) on a dictionary A of random unit-norm atoms, which the decoder learns to
    follow: We = A'/L, S = I - A'A/L, c = 0, theta = lambda/L, L the largest eigenvalue of A'A.
    """

    name = "lista"

    class Config(ssl_ae.Config):
        steps: int = Field(3, ge=0, le=100, description="T, how often S is applied")
        sparsity: float = Field(0.1, gt=0, description="lambda that the thresholds start from; give sparse_l1 the same weight")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        atoms = nn.functional.normalize(torch.randn(math.prod(shapes.x), shapes.latent), dim=0)  # (D, K)
        gram = atoms.T @ atoms
        step = 1.0 / largest_eigenvalue(gram)
        self.encode = nn.Linear(*atoms.shape)
        nn.init.zeros_(self.encode.bias)
        if config.steps:
            self.inhibit = nn.Linear(shapes.latent, shapes.latent, bias=False)
        with torch.no_grad():
            self.encode.weight.copy_(step * atoms.T)
            if config.steps:
                self.inhibit.weight.copy_(torch.eye(shapes.latent) - step * gram)
        theta = config.sparsity * step
        raw = theta + (-(-theta).expm1()).log()  # softplus(raw) = theta, whatever theta's size
        self.raw_threshold = nn.Parameter(raw.repeat(shapes.latent))

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point, (B, K)."""
        threshold = nn.functional.softplus(self.raw_threshold)
        drive = self.encode(x.flatten(1))
        drive = drive.to(torch.promote_types(drive.dtype, torch.float32))
        h = shrink(drive, threshold)
        for t in range(1, self.config.steps + 1):
            h = shrink(drive + self.inhibit(run.tap(h, f"h{t}")), threshold)
        return ssl_ae.Point(h)
