"""Posteriors q(z|x): the one place that says how a layer's output becomes a distribution over codes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

Posterior = Literal["point", "diag", "full"]  # what a `Latent` makes of a layer
PosteriorKind = Literal["point", "diag", "full", "bernoulli", "categorical"]

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


class DiscreteCode(Distribution):
    """Independent symbols that take one of finitely many values each. Batch shape (B,), event shape (K,).

    `rsample` gives exact symbols of 0s and 1s. No reparametrisation of them has a derivative, so the gradient is that of the
    same draw relaxed by `temperature` (straight-through Gumbel; Jang et al. 2017, sec. 2.2; Maddison et al. 2017). It is
    BIASED: the decoder's gradient is taken at the symbols and applied to values between them. A lower temperature lessens
    the bias and raises the variance.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        # (B, *shape of the symbols); half precision would round probabilities near 1 to it
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.temperature = temperature
        super().__init__(logits.shape[:1], (math.prod(logits.shape[1:]),), validate_args=False)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.mean)

    def entropy(self) -> Tensor:
        """In nats, (B,)."""
        return self.most_entropy - self.kl_to_uniform()


class BernoulliCode(DiscreteCode):
    """K bits, P(z_k = 1) = sigmoid(logits_k). The relaxed bit is sigmoid((logits + logistic noise) / temperature)."""

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        """logits (B, K)."""
        super().__init__(logits, temperature)
        self.most_entropy = logits.shape[1] * math.log(2)

    @property
    def mean(self) -> Tensor:
        """(B, K) probabilities of 1."""
        return self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits.dtype)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        u = torch.rand(*sample_shape, *self.logits.shape, dtype=self.logits.dtype, device=self.logits.device)
        u = u.clamp_min(torch.finfo(u.dtype).eps)
        disturbed = self.logits + u.log() - (-u).log1p()
        return straight_through((disturbed > 0).to(u.dtype), (disturbed / self.temperature).sigmoid())

    def log_prob(self, z: Tensor) -> Tensor:
        """Of bits z (..., B, K), in nats, (..., B)."""
        return (nn.functional.logsigmoid(self.logits) * z + nn.functional.logsigmoid(-self.logits) * (1 - z)).sum(-1)

    def kl_to_uniform(self) -> Tensor:
        """K log 2 + sum_k p log p + (1 - p) log (1 - p) in nats, (B,)."""
        return self.log_prob(self.mean) + self.most_entropy


class CategoricalCode(DiscreteCode):
    """G multinoulli symbols of L values, one-hot in a row: K = G L. Relaxed: softmax((logits + Gumbel noise) / temperature)."""

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        """logits (B, G, L)."""
        super().__init__(logits, temperature)
        self.most_entropy = logits.shape[1] * math.log(logits.shape[2])

    @property
    def mean(self) -> Tensor:
        """(B, K) probabilities, which add up to 1 in each symbol."""
        return self.logits.softmax(-1).flatten(1)

    @property
    def mode(self) -> Tensor:
        return self._one_hot(self.logits).flatten(1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        waits = torch.empty(*sample_shape, *self.logits.shape, dtype=self.logits.dtype, device=self.logits.device)
        disturbed = self.logits - waits.exponential_().log()  # -log of an exponential draw is a Gumbel draw
        return straight_through(self._one_hot(disturbed), (disturbed / self.temperature).softmax(-1)).flatten(-2)

    def log_prob(self, z: Tensor) -> Tensor:
        """Of one-hot symbols z (..., B, K), in nats, (..., B)."""
        return (self.logits.log_softmax(-1).flatten(1) * z).sum(-1)

    def kl_to_uniform(self) -> Tensor:
        """G log L + sum_gl p log p in nats, (B,)."""
        return self.log_prob(self.mean) + self.most_entropy

    @staticmethod
    def _one_hot(scores: Tensor) -> Tensor:
        return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, to the bit, with the gradient of `soft` (Bengio et al. 2013, arXiv:1308.3432)."""
    return hard + (soft - soft.detach())


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

    @property
    def mean_weight(self) -> Tensor:
        """The rows of W that give E[z|x], (K, H)."""
        weight = self.linear.weight
        return weight if self.posterior == "point" else weight[: self.latent]  # the gradient of a slice is two more passes

    def forward(self, h: Tensor) -> Distribution:
        out = self.linear(h).to(torch.promote_types(h.dtype, torch.float32))
        if self.posterior == "point":
            return Point(out)
        k = self.latent
        mean, scale, *rest = out.split([k, k, out.shape[1] - 2 * k] if self.posterior == "full" else k, dim=1)
        # torch's softplus takes ten times as long over rows that do not lie together
        scale = nn.functional.softplus(scale.contiguous()) + SMALLEST_SCALE
        if self.posterior == "diag":
            return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
        i, j = torch.tril_indices(k, k, offset=-1, device=out.device)
        scale_tril = torch.diag_embed(scale)  # (B, K, K)
        scale_tril[:, i, j] = rest[0]
        return MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)


def standard_normal(like: Tensor) -> Independent:
    """The prior p(z) = N(0, I) over codes such as `like` (..., K): event shape (K,), in its dtype and on its device."""
    mean = like.new_zeros(like.shape[-1:])
    return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1, validate_args=False)


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


def kl_to_prior(q: Distribution) -> Tensor:
    """KL(q(z|x) || p(z)) per row, in nats, (B,), to the prior of q's kind: uniform over discrete codes, else N(0, I).

    Summed over the code, no 1/K. Raises TypeError for a posterior that has no such prior, such as a certain one.
    """
    return q.kl_to_uniform() if isinstance(q, DiscreteCode) else kl_to_standard_normal(q)


def prior_of(q: Distribution) -> Distribution:
    """The prior p(z) over codes of q's kind, as `kl_to_prior` takes it: log_prob(z) of z (..., B, K) is (..., B)."""
    if isinstance(q, DiscreteCode):
        return type(q)(torch.zeros_like(q.logits), q.temperature)
    return standard_normal(q.mean)
