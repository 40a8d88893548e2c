"""Posteriors q(z|x): the one place that says how a layer's output becomes a distribution over codes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

Posterior = Literal["point", "diag", "full"]

SMALLEST_SCALE = 1e-5  # keeps log q finite where softplus underflows


class Point(Distribution):
    """The certain distribution: the posterior of a deterministic autoencoder. Batch shape (B,), event shape (K,)."""

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, value: Tensor) -> None:
        self.value = value  # (B, K)
        super().__init__(value.shape[:1], value.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.value

    @property
    def stddev(self) -> Tensor:
        return torch.zeros_like(self.value)

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.value)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.value.expand(*sample_shape, *self.value.shape)


class Latent(nn.Module):
    """h (B, H) -> q(z|x) over K dimensions.

    point: z = W h + b.
    diag:  N(mu, diag(sigma^2)); eps scales the standard deviation, z = mu + sigma * eps (Kingma & Welling 2014, eq. 10).
    full:  N(mu, L L') with lower-triangular L of positive diagonal, z = mu + L eps (Kingma & Welling 2019, sec. 2.5.1).

    Scales are softplus(.) + 1e-5, computed in float32 whatever the precision of h.
    """

    def __init__(self, width: int, latent: int, posterior: Posterior, bias: bool = True) -> None:
        super().__init__()
        self.latent, self.posterior = latent, posterior
        off_diagonal = latent * (latent - 1) // 2
        outputs = {"point": latent, "diag": 2 * latent, "full": 2 * latent + off_diagonal}[posterior]
        self.linear = nn.Linear(width, outputs, bias=bias)

    def forward(self, h: Tensor) -> Distribution:
        out = self.linear(h).to(torch.promote_types(h.dtype, torch.float32))
        if self.posterior == "point":
            return Point(out)
        k = self.latent
        mean, scale, *rest = out.split([k, k, out.shape[1] - 2 * k] if self.posterior == "full" else k, dim=1)
        scale = nn.functional.softplus(scale) + SMALLEST_SCALE
        if self.posterior == "diag":
            return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
        i, j = torch.tril_indices(k, k, offset=-1, device=out.device)
        scale_tril = torch.diag_embed(scale)  # (B, K, K)
        scale_tril[:, i, j] = rest[0]
        return MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)


def kl_to_standard_normal(q: Distribution) -> Tensor:
    """KL(q(z|x) || N(0, I)) per row, in nats, (B,). Kingma & Welling 2014, appendix B; summed over K, no 1/K.

    Full covariance: 1/2 (tr LL' + |mu|^2 - K) - sum log L_kk. Raises TypeError for a posterior without a density.
    """
    if isinstance(q, MultivariateNormal):
        second_moment = q._unbroadcasted_scale_tril.square().sum((-2, -1)) + q.loc.square().sum(-1)
        log_det = q._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (second_moment - q.loc.shape[-1]) - log_det
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        mean, scale = q.base_dist.loc, q.base_dist.scale
        return (0.5 * (scale.square() + mean.square() - 1.0) - scale.log()).sum(-1)
    raise TypeError(f"{type(q).__name__} has no density to compare with N(0, I)")
