"""Penalties of weights and of codes."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae
from ssl_ae.latent import kl_to_standard_normal


class Weights(ssl_ae.Regularizer):
    """sum |w| (L1) or 1/2 sum w^2 (L2) over weight matrices and kernels; biases and norms are free (Krogh & Hertz 1991)."""

    name = "weights"
    over = ssl_ae.Over.MODEL

    class Config(ssl_ae.Config):
        norm: Literal["l1", "l2"] = Field("l2", description="l2: 1/2 sum w^2, whose gradient is w; l1: sum |w|")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """() over encoder and decoder; a head has its own weight decay in the optimizer."""
        parts = [trace.model.encoder, trace.model.decoder]
        matrices = [p for part in parts for p in part.parameters() if p.dim() > 1]
        if self.config.norm == "l1":
            return torch.stack([p.abs().sum() for p in matrices]).sum()
        return 0.5 * torch.stack([p.square().sum() for p in matrices]).sum()


class SparseL1(ssl_ae.Regularizer):
    """sum_j |h_j| per row over the chosen layers: few active units (Olshausen & Field 1996)."""

    name = "sparse_l1"
    layers = ("code",)

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        return torch.stack([h.abs().flatten(1).sum(1) for h in trace.layers(self.layers)]).sum(0)


class Kl(ssl_ae.Regularizer):
    """KL(q(z|x) || N(0, I)) per row in nats, analytic (Kingma & Welling 2014, appendix B)."""

    name = "kl"

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        return kl_to_standard_normal(trace.q)

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        encoder = recipe.encoder
        if encoder.cls.posterior(encoder.config) != "point":
            return []
        return [
            f"kl needs a random posterior, but encoder {encoder.full_name} returns Point. "
            "Set model.encoder.posterior: diag, or remove kl."
        ]
