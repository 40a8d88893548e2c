"""Penalties of weights and of codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import DiscreteCode, kl_to_prior

ACTIVE = 0.01  # nats that a dimension of the code must say about x, on average, to count as used


class Weights(ssl_ae.Regularizer):
    """sum |w| (L1) or 1/2 sum w^2 (L2) over weight matrices and kernels; biases and norms are free (Krogh & Hertz 1991)."""

    name = "weights"
    over = ssl_ae.Over.MODEL

    class Config(ssl_ae.Config):
        norm: Literal["l1", "l2"] = Field("l2", description="l2: 1/2 sum w^2, whose gradient is w; l1: sum |w|")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """() over encoder and decoder, 0 where they have no matrices; a head has its own weight decay in the optimizer."""
        parts = [trace.model.encoder, trace.model.decoder]
        matrices = [p for part in parts for p in part.parameters() if p.dim() > 1]
        # a zero with a gradient: in a phase where none of the matrices trains, the sum alone would have none to go back from
        total = next(trace.model.parameters()).new_zeros((), requires_grad=True)
        if self.config.norm == "l1":
            return sum([p.abs().sum() for p in matrices], total)
        return sum([0.5 * p.square().sum() for p in matrices], total)


class SparseL1(ssl_ae.Regularizer):
    """sum_j |h_j| per row over the chosen layers: few active units (Olshausen & Field 1996)."""

    name = "sparse_l1"
    layers = ("code",)

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        return torch.stack([h.abs().flatten(1).sum(1) for h in trace.layers(self.layers)]).sum(0)

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Histogram]:
        """How many units are active in a row; how large they are, where none is ever exactly 0."""
        h = torch.cat([h.flatten(1) for h in trace.layers(self.layers)], 1).float()  # (B, units)
        active = (h != 0).float().mean(1)
        if bool((active == 1).all()):
            title = "Size of the units, none of which is exactly 0"
            yield ssl_ae.Histogram("activity", title, h.abs().flatten(), "|h| of a unit in a row")
        else:
            title = "Active units of each row: those that are not 0"
            yield ssl_ae.Histogram("activity", title, active, "part of the units, in [0, 1]", {"mean": float(active.mean())})


class Kl(ssl_ae.Regularizer):
    """KL(q(z|x) || p(z)) per row in nats, analytic, p(z) = N(0, I) (Kingma & Welling 2014, appendix B).

    For a discrete code p(z) is uniform: K log 2 less the entropy of K bits, G log L less that of G symbols of L values.
    """

    name = "kl"
    needs = frozenset({ssl_ae.Need.LABEL_SUM})

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        return kl_to_prior(trace.q)

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Lines]:
        """Which dimensions of the code are used: one at its prior says nothing about x."""
        nats = kl_by_dimension(trace.q).sort(descending=True).values
        used = f"{int((nats > ACTIVE).sum())} of {len(nats)} above {ACTIVE} nats"
        title = f"KL of each dimension of the code from its prior, largest first: {used}"
        yield ssl_ae.Lines("kl_by_dimension", title, {"KL": nats}, "dimensions of the code, by their KL", "nats a row")

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        encoder = recipe.encoder
        if encoder.cls.posterior(encoder.config) != "point":
            return []
        has_option = "posterior" in encoder.cls.Config.model_fields
        cure = "Set model.encoder.posterior: diag" if has_option else "Take an encoder, or an option of it, that draws its codes"
        return [f"kl needs a random posterior, but encoder {encoder.full_name} returns Point. {cure}, or remove kl."]


def kl_by_dimension(q: Distribution) -> Tensor:
    """Mean over rows of KL(q(z_k|x) || p(z_k)) of each marginal, in nats: (K,), or (G,) of G symbols.

    They add up to the KL of the whole code where its dimensions are independent given x, and to less under full covariance.
    """
    if isinstance(q, DiscreteCode):
        symbols = q.logits.split(1, dim=1)
        return torch.stack([type(q)(logits).kl_to_uniform() for logits in symbols], 1).mean(0)
    return 0.5 * (q.variance + q.mean.square() - 1.0 - q.variance.log()).mean(0)
