"""How likely a model finds its rows: lower bounds of log p(x), by draws from q(z|x), under the prior p(z) of its kind of code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ssl_ae.latent import DiscreteCode, kl_to_prior, prior_of
from ssl_ae.model import Model, frozen

DECODED_ROWS = 4096  # codes decoded at once, so that memory does not grow with the number of draws


def elbo(model: Model, x: Tensor, target: Tensor, draws: int = 1) -> Tensor:
    """E_q[log p(target|z)] - KL(q(z|x) || p(z)) per row, in nats, (B,): what training maximises, without its noise.

    Kingma & Welling 2014, eq. 3 and 10: the expectation by `draws` from q, the KL term in closed form. p(z) is N(0, I), for
    discrete codes uniform. x and target are (B, *shape). Draws come from torch's current generator. Raises TypeError for a
    posterior without that closed form, such as the certain one of a deterministic autoencoder, RecipeError for a decoder that
    decodes no code alone.
    """
    with frozen(model):
        q = model.posterior(x)
        divergence = kl_to_prior(q)
        total = torch.zeros_like(divergence)
        for z in _draws(q, len(x), draws):
            total = total + _log_likelihood(model, z, target).sum(0)
    return total / draws - divergence


def importance_weighted_bound(model: Model, x: Tensor, target: Tensor, draws: int) -> Tensor:
    """log 1/S sum_s p(target|z_s) p(z_s) / q(z_s|x) with S `draws` z_s from q(z|x), per row, in nats, (B,).

    Burda, Grosse & Salakhutdinov 2016, eq. 8. Its expectation is the ELBO's for S = 1, grows with S and tends to log p(x); for
    the exact posterior every single value is log p(x). Prior, shapes and draws are as for `elbo`. Raises TypeError for a
    posterior whose codes the prior does not cover.
    """
    with frozen(model):
        q = model.posterior(x)
        _check_density(q)
        prior, total = prior_of(q), None
        for z in _draws(q, len(x), draws):
            weights = (_log_likelihood(model, z, target) + prior.log_prob(z) - q.log_prob(z)).logsumexp(0)
            total = weights if total is None else torch.logaddexp(total, weights)
    return total - torch.log(torch.full_like(total, draws))


def _draws(q: Distribution, rows: int, draws: int) -> Iterator[Tensor]:
    """`draws` codes of each row in parts (s, B, K), small enough to be decoded at once."""
    if draws < 1:
        raise ValueError(f"a bound needs at least one draw, got {draws}")
    part = max(1, DECODED_ROWS // max(rows, 1))
    for start in range(0, draws, part):
        yield q.rsample(torch.Size([min(part, draws - start)]))


def _log_likelihood(model: Model, z: Tensor, target: Tensor) -> Tensor:
    """log p(target|z) of s codes a row, (s, B, K) -> (s, B), in float32 at least."""
    repeated = target.expand(len(z), *target.shape).flatten(0, 1)
    value = model.decode(z.flatten(0, 1)).log_prob(repeated).unflatten(0, z.shape[:2])
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_density(q: Distribution) -> None:
    """Raises TypeError unless q is a density over R^K or a probability of symbols, as its prior is."""
    if isinstance(q, DiscreteCode):
        return
    try:
        support = q.support
    except NotImplementedError:
        support = None
    if getattr(support, "base_constraint", None) is not constraints.real:
        raise TypeError(
            f"{type(q).__name__} has no density over R^K, so log p(x) has no bound by draws from it. "
            "Give the encoder a random posterior: diag or full."
        )
