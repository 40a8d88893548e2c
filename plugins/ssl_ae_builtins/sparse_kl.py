"""Sparse units by their mean activity: each shall be active for a small part of the rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae
from ssl_ae.errors import listing
from ssl_ae.trace import matches

NEVER = 1e-6  # mean activity closer than this to 0 or 1 has no gradient: a saturated unit has none of its own either


class SparseKl(ssl_ae.Regularizer):
    """sum_j KL(rho || rho_j) = sum_j rho log(rho / rho_j) + (1 - rho) log((1 - rho) / (1 - rho_j)) (Ng 2011, CS294A, sec. 3).

    rho_j is the mean of unit j over every row of the step, on all ranks and in all micro-batches, as the pass saw the layer
    (with dropout or noise on it, those included). Each number of a layer is a unit. In nats, once a step: () and no 1/K.
    Acts on the code unless `layers` says otherwise; the layers must hold values in [0, 1], as a sigmoid gives.
    """

    name = "sparse_kl"
    over = ssl_ae.Over.STEP
    needs = frozenset({ssl_ae.Need.STEP_MEAN})
    layers = ("code",)

    class Config(ssl_ae.Config):
        rho: float = Field(0.05, gt=0, lt=1, description="the mean activity that each unit shall have")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """()."""
        return torch.stack([self._divergence(trace.step_mean(h)).sum() for h in trace.layers(self.layers)]).sum()

    def _divergence(self, activity: Tensor) -> Tensor:
        """KL(Bernoulli(rho) || Bernoulli(activity)), elementwise."""
        rho, activity = self.config.rho, activity.clamp(NEVER, 1 - NEVER)
        return rho * (rho / activity).log() + (1 - rho) * ((1 - rho) / (1 - activity)).log()

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Histogram]:
        activity = torch.cat([h.float().mean(0).flatten() for h in trace.layers(self.layers)])
        yield ssl_ae.Histogram(
            "mean_activity",
            "Mean activity of each unit over rows of the validation split",
            activity,
            "mean activity of a unit, in [0, 1]",
            {"rho": self.config.rho},
        )

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        encoder = recipe.encoder
        place, part = next((i, part) for i, part in enumerate(recipe.regularizers) if part.config is config)
        layers = part.layers or cls.layers
        bounded = encoder.cls.unit_interval(encoder.config)
        if all(matches(pattern, bounded) for pattern in layers):
            return []
        there = f"only {listing(bounded, 'and')} does so" if bounded else "none does so"
        return [
            f"model.regularizers.{place} ({part.full_name}).layers = {list(layers)}: only a layer with values in [0, 1] has a "
            f"mean activity, and of encoder {encoder.full_name} with these options {there}. Give the layer a sigmoid (mlp: "
            "code_activation: sigmoid for the code, activation: sigmoid for h*), name such layers, or take sparse_l1."
        ]
