"""Codes of bits and of multinoulli symbols: moments of draws, KL by enumeration, and the straight-through gradient by hand."""

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from ssl_ae.latent import BernoulliCode, CategoricalCode, Point, kl_to_prior, kl_to_standard_normal, prior_of, straight_through

B, DRAWS = 3, 100_000
G, L, K = 2, 3, 5  # symbols of L values; bits


def code(kind, temperature=1.0, dtype=torch.float64):
    shape = (B, K) if kind == "bits" else (B, G, L)
    logits = 1.5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cls = BernoulliCode if kind == "bits" else CategoricalCode
    return cls(logits.to(dtype).requires_grad_(), temperature)


def every_code(kind):
    """All 2^K or L^G codes, (codes, K)."""
    if kind == "bits":
        return torch.tensor(list(itertools.product([0.0, 1.0], repeat=K)), dtype=torch.float64)
    one_hot = torch.eye(L, dtype=torch.float64)
    return torch.stack([torch.cat([one_hot[i] for i in chosen]) for chosen in itertools.product(range(L), repeat=G)])


KINDS = pytest.mark.parametrize("kind", ["bits", "symbols"])


@KINDS
def test_shapes_and_means(kind):
    q = code(kind)
    latent = K if kind == "bits" else G * L
    assert (q.batch_shape, q.event_shape) == ((B,), (latent,))
    assert q.rsample(torch.Size([7])).shape == (7, B, latent)
    assert q.rsample().shape == q.mean.shape == q.stddev.shape == q.mode.shape == (B, latent)
    if kind == "bits":
        torch.testing.assert_close(q.mean, 1 / (1 + (-q.logits).exp()))
    else:
        torch.testing.assert_close(q.mean.view(B, G, L).sum(2), torch.ones(B, G, dtype=torch.float64))
    torch.testing.assert_close(q.stddev.square(), q.mean * (1 - q.mean))


@KINDS
def test_moments_of_draws(kind):
    """1e5 draws: bits are independent; values of one symbol exclude one another. Within 5 s.e., at most 1/2 sqrt(n)."""
    q = code(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        z = q.rsample(torch.Size([DRAWS]))
        assert z.unique().tolist() == [0.0, 1.0]
        assert ((z.mean(0) - q.mean).abs() < 5 * q.stddev / DRAWS**0.5).all()
        second = torch.einsum("sbi,sbj->bij", z, z) / DRAWS
        p = q.mean
        expected = p[:, :, None] * p[:, None, :]
        if kind == "symbols":
            within = torch.block_diag(*[torch.ones(L, L)] * G).bool()
            expected = expected.masked_fill(within, 0.0)
        expected = expected.diagonal_scatter(p, dim1=1, dim2=2)
    assert ((second - expected).abs() < 5 * 0.5 / DRAWS**0.5).all()


@KINDS
def test_probabilities_and_kl_by_enumeration(kind):
    q, codes = code(kind), every_code(kind)
    log_q = q.log_prob(codes[:, None, :])  # (codes, B)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close((log_q.exp()[:, :, None] * codes[:, None, :]).sum(0), q.mean)
    expected = (log_q.exp() * (log_q + np.log(len(codes)))).sum(0)
    torch.testing.assert_close(kl_to_prior(q), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.entropy(), -(log_q.exp() * log_q).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior_of(q).log_prob(codes[:, None, :]), torch.full_like(log_q, -np.log(len(codes))))
    (one,) = torch.autograd.grad(kl_to_prior(q).sum(), q.logits, retain_graph=True)
    (other,) = torch.autograd.grad(expected.sum(), q.logits)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@KINDS
def test_the_mode_is_the_likeliest_code(kind):
    q, codes = code(kind), every_code(kind)
    assert torch.equal(codes[q.log_prob(codes[:, None, :]).argmax(0)], q.mode)


@KINDS
def test_the_value_is_hard_and_the_gradient_that_of_the_relaxed_draw(kind):
    """d/dlogits f(z) = f'(z) d relaxed / dlogits, with the noise of the same seed written out."""
    temperature = 0.7
    q = code(kind, temperature)
    torch.manual_seed(4)
    z = q.rsample()
    slope = torch.linspace(-1, 2, z.shape[1], dtype=torch.float64)
    (found,) = torch.autograd.grad((z.square() * slope).sum(), q.logits)  # f'(z) = 2 z slope
    logits = q.logits.detach().requires_grad_()
    torch.manual_seed(4)
    if kind == "bits":
        u = torch.rand(B, K, dtype=torch.float64)
        relaxed = torch.sigmoid((logits + torch.log(u / (1 - u))) / temperature)
        assert torch.equal(z, (relaxed > 0.5).double())
    else:
        gumbel = -torch.empty(B, G, L, dtype=torch.float64).exponential_().log()
        relaxed = torch.softmax((logits + gumbel) / temperature, 2).flatten(1)
        assert torch.equal(z.view(B, G, L).argmax(2), relaxed.view(B, G, L).argmax(2))
    (expected,) = torch.autograd.grad((2 * z.detach() * slope * relaxed).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_gradient_is_biased_as_the_docstring_says():
    """f(z) = z at logit 0: the truth is d p / d s = 1/4. At temperature 1 the draws' gradient is (u (1 - u)) of a uniform u,
    1/6 in the mean with variance 1/30 - 1/36; a lower temperature comes nearer and varies more."""
    logits = torch.zeros(DRAWS, 1, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    sharp, soft = (
        torch.autograd.grad(BernoulliCode(logits, temperature).rsample().sum(), logits)[0] for temperature in (0.1, 1.0)
    )
    assert abs(float(soft.mean()) - 1 / 6) < 5 * ((1 / 30 - 1 / 36) / DRAWS) ** 0.5
    assert abs(float(sharp.mean()) - 1 / 4) < abs(float(soft.mean()) - 1 / 4) / 4
    assert float(sharp.std()) > 3 * float(soft.std())


def test_straight_through_is_hard_to_the_bit():
    soft = torch.rand(1009, requires_grad=True)
    hard = (soft > 0.5).float()
    value = straight_through(hard, soft)
    assert torch.equal(value, hard)
    assert torch.equal(torch.autograd.grad(value.sum(), soft)[0], torch.ones(1009))


@KINDS
def test_extreme_logits_and_half_precision(kind):
    logits = torch.tensor([[-300.0, 300.0, 0.0, 80.0, -80.0, 5.0]], dtype=torch.bfloat16).requires_grad_()
    q = BernoulliCode(logits) if kind == "bits" else CategoricalCode(logits.view(1, G, L))
    assert q.mean.dtype == torch.float32
    kl = kl_to_prior(q)
    assert bool(torch.isfinite(kl).all())
    assert -1e-5 < float(kl.detach()) < 6 * np.log(2) + 1e-5
    (kl.sum() + q.rsample().sum()).backward()
    assert bool(torch.isfinite(logits.grad).all())


def test_other_posteriors_keep_their_prior():
    z = torch.randn(B, K)
    q = Independent(Normal(z, 0.3 + z.abs()), 1)
    assert torch.equal(kl_to_prior(q), kl_to_standard_normal(q))
    assert torch.equal(prior_of(q).log_prob(z), Independent(Normal(torch.zeros(K), torch.ones(K)), 1).log_prob(z))
    with pytest.raises(TypeError, match="Point has no density"):
        kl_to_prior(Point(z))
