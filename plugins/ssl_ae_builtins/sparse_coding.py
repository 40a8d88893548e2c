"""Sparse coding: the code of a row is the lasso's solution over the decoder's dictionary, found by FISTA."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae
from ssl_ae.trace import matches
from ssl_ae_builtins.linear import LinearDecoder
from ssl_ae_builtins.penalties import SparseL1

SQUARINGS = 6  # of the Gram matrix: the bound on its largest eigenvalue is at most K^(1/64) times it, 1.09 for K = 256
SMALLEST_EIGENVALUE = 1e-12  # of a dictionary of zeros, whose codes are zero whatever the step


def shrink(h: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(h) max(|h| - threshold, 0), elementwise: argmin_u 1/2 (u - h)^2 + threshold |u|."""
    return h.sign() * (h.abs() - threshold).relu()


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """A bound on the largest eigenvalue of a positive semi-definite (K, K), (): (tr G^q)^(1/q), q = 2^SQUARINGS.

    Never below it and at most K^(1/q) times it, so that 1/L is a step that FISTA may take; and no host wait, as an
    eigenvalue routine has. Powers are divided by their traces on the way, log(bound) = sum_i log(trace_i) / 2^i.
    """
    log = gram.new_zeros(())
    for i in range(SQUARINGS + 1):
        gram = gram @ gram if i else gram
        trace = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram / trace
        log = log + trace.log() / 2**i
    return log.exp().clamp_min(SMALLEST_EIGENVALUE)


@torch.no_grad()
def fista(x: Tensor, dictionary: Tensor, sparsity: float, iterations: int) -> Tensor:
    """argmin_h 1/2 |x - W h|^2 + sparsity |h|_1 of each row, x (B, D), W (D, K) -> (B, K).

    FISTA with constant step 1/L (Beck & Teboulle 2009, eq. 4.1-4.3) from h = 0. A row whose momentum points uphill starts its
    momentum afresh (O'Donoghue & Candes 2015, gradient scheme): linear convergence near the solution, and rows stay independent.
    On the Gram matrix G = W'W and c = W'x an iteration costs B K^2.
    """
    gram, correlation = dictionary.T @ dictionary, x @ dictionary
    step = 1.0 / largest_eigenvalue(gram)
    descend = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - step * gram  # y -> y - step * G y
    offset, threshold = step * correlation, step * sparsity
    h = ahead = torch.zeros_like(correlation)
    t = correlation.new_ones(len(x), 1)
    for _ in range(iterations):
        new = shrink(torch.addmm(offset, ahead, descend), threshold)
        uphill = ((ahead - new) * (new - h)).sum(1, keepdim=True) > 0
        grown = (1 + (1 + 4 * t.square()).sqrt()) / 2
        momentum = torch.where(uphill, 0.0, (t - 1) / grown)
        ahead = new + momentum * (new - h)
        h, t = new, torch.where(uphill, 1.0, grown)
    return h


class SparseCoding(ssl_ae.Encoder):
    """z = argmin_h 1/2 |x - W h - b|^2 + lambda |h|_1, W, b the decoder's (Olshausen & Field 1996; FISTA: Beck & Teboulle 2009).

    The 1/2 is that of the gaussian log-likelihood: |x - W h - b|^2 + lambda' |h|_1 has the same minimum with lambda' = 2 lambda.
    The encoder has no parameters, and training takes the code as given: at the minimum over h, the gradient of the objective in
    W and b is the one with h held fixed, so l_X + lambda |z|_1 learns the dictionary. Take `unit_norm` beside it: where atoms
    may grow, h shrinks without end.
    """

    name = "sparse_coding"
    reads_decoder = True
    differentiable = False

    class Config(ssl_ae.Config):
        sparsity: float = Field(1.0, gt=0, description="lambda, in nats per unit of the code; the weight of sparse_l1 beside it")
        iterations: int = Field(100, ge=1, le=10_000, description="of FISTA for every row, from h = 0")

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point, (B, K), without gradient; in float32 at least, whatever autocast says."""
        linear = run.decoder.linear
        with torch.autocast(x.device.type, enabled=False):
            weight = linear.weight.detach().to(torch.promote_types(linear.weight.dtype, torch.float32))
            x = x.detach().flatten(1).to(weight.dtype)
            x = x if linear.bias is None else x - linear.bias.detach()
            return ssl_ae.Point(fista(x, weight, self.config.sparsity, self.config.iterations))

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        """The atoms, most used first."""
        usage = trace.q.mean.abs().mean(0)
        atoms = trace.model.decoder.linear.weight.T[usage.argsort(descending=True)]  # (K, D)
        yield ssl_ae.Tiles("atoms", "Atoms of the dictionary, those used most first", atoms.unflatten(1, self.shapes.x))

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        return [*complaints_about_decoder(recipe), *complaints_about_penalty(config, recipe), *complaints_about_mode(recipe)]


def complaints_about_decoder(recipe) -> list[str]:
    decoder = recipe.decoder
    if decoder.cls is not LinearDecoder:
        return [
            f"model.decoder.name = {decoder.full_name}: sparse_coding solves the lasso over the columns of the linear "
            "decoder's matrix. Set model.decoder: {name: linear}."
        ]
    config = decoder.config
    if (config.likelihood, config.variance) != ("gaussian", "unit"):
        given = f"likelihood = {config.likelihood}" if config.likelihood != "gaussian" else f"variance = {config.variance}"
        return [
            f"model.decoder.{given}: sparse_coding minimises 1/2 |x - W h - b|^2 + lambda |h|_1, which is l_X of a gaussian "
            "with unit variance. Set likelihood: gaussian and variance: unit."
        ]
    return []


def complaints_about_penalty(config: SparseCoding.Config, recipe) -> list[str]:
    """What training reports and minimises must be what the code minimises."""
    on_code = [part for part in recipe.regularizers if part.cls is SparseL1 and matches("code", part.layers or SparseL1.layers)]
    weight, wanted = sum(part.weight for part in on_code), f"{{name: sparse_l1, weight: {config.sparsity:g}}}"
    if not on_code:
        return [
            f"model.regularizers: sparse_coding minimises l_X + {config.sparsity:g} |h|_1, but the recipe has no sparse_l1 "
            f"on the code. Add {wanted}."
        ]
    if not math.isclose(weight, config.sparsity):
        return [
            f"model.encoder.sparsity = {config.sparsity:g}: sparse_coding minimises l_X + {config.sparsity:g} |h|_1, but "
            f"sparse_l1 weighs the code's |h|_1 by {weight:g}. Give both the same number."
        ]
    if any(part.warmup_steps for part in on_code):
        return [
            "model.regularizers: sparse_l1.warmup_steps: sparse_coding has the same lambda at every step. "
            f"Give {wanted} without warmup_steps."
        ]
    return []


def complaints_about_mode(recipe) -> list[str]:
    if recipe.recipe.finetune.mode != "end-to-end":
        return []
    return [
        "finetune.mode = end-to-end: the code of sparse_coding passes no gradient on, so l_Y would train the head alone. "
        "Set finetune.mode: sequential or joint, or model.encoder: {name: lista}, which back-propagation can train."
    ]
