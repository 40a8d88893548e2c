"""The contractive penalty: codes that hardly move when the sample does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import ssl_ae
from ssl_ae_builtins import jacobians

SHOWN_ROWS = 16  # whose singular values the picture averages


class Contractive(ssl_ae.Regularizer):
    """|dE[z|x]/dx|_F^2 = sum_kd (dE[z_k|x] / dx_d)^2 per row, exact (Rifai et al. 2011, contractive autoencoder).

    It is of the undisturbed map with frozen statistics at the clean sample, whatever noise the pass has; of the mean, where
    the posterior is random. No 1/2, no 1/K. Encoders that know a closed form give it (`squared_jacobian`: linear, and mlp
    with at most one hidden layer, for a sigmoid code sum_k (z_k (1 - z_k))^2 |w_k|^2); for others K vector-Jacobian products
    are made, which cost K backward passes.
    """

    name = "contractive"
    needs = frozenset({ssl_ae.Need.CLEAN})

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        # what always changes the input is part of the map from x to z, but not of the encoder's own form
        plain = not any(r.always and "perturb" in r.verbs for r in trace.model.regularizers)
        closed = trace.model.encoder.squared_jacobian(trace.clean) if plain else None
        if closed is not None:
            return closed
        numbers = trace.q.mean.shape[1] * sum(layer[0].numel() for layer in trace.clean.values())
        return jacobians.by_autograd(trace.encode, trace.batch.x, numbers)

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Lines]:
        with torch.no_grad():
            rows = [row.flatten(1) for row in jacobians.rows_of(trace.encode, trace.batch.x[:SHOWN_ROWS])]
        values = torch.linalg.svdvals(torch.stack(rows, dim=1).float()).mean(0)  # (B, K, D) -> (min(K, D),)
        title = f"Singular values of the Jacobian dE[z|x]/dx, sorted, mean over {len(rows[0])} rows"
        yield ssl_ae.Lines("jacobian", title, {"singular value": values}, "rank", "singular value", log=True)

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        encoder = recipe.encoder
        if encoder.cls.differentiable:
            return []
        return [
            f"contractive needs dE[z|x]/dx, but encoder {encoder.full_name} finds its code by a search that carries no gradient. "
            "Take an encoder that is a smooth map (linear, mlp, conv), or remove contractive."
        ]
