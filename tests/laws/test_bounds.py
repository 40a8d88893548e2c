"""The ELBO and the importance-weighted bound on models whose log p(x) is known: a linear Gaussian one, and one by quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from engine_kit import fresh, resolved
from linear_kit import B, D, K, Linear
from scipy import integrate, stats
from torch.distributions import MultivariateNormal

from ssl_ae import Batch, Need
from ssl_ae.bounds import elbo, importance_weighted_bound
from ssl_ae.objective import reconstruction


class AtNodes(MultivariateNormal):
    """Its draws are mu + L e with e in {-1, 1}^K: the mean of a quadratic over them is its expectation, exactly."""

    def rsample(self, sample_shape=torch.Size()):
        (count,) = sample_shape
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=self.loc.dtype)] * self.loc.shape[-1])
        assert count == len(signs)
        return self.loc + (self.scale_tril @ signs[:, None, :, None])[..., 0]


@pytest.fixture
def at_nodes(monkeypatch):
    """Gives a linear model's posterior the draws above."""

    def patch(linear):
        encode = linear.model.encoder.forward

        def forward(x, run):
            q = encode(x, run)
            return AtNodes(q.loc, scale_tril=q.scale_tril, validate_args=False)

        monkeypatch.setattr(linear.model.encoder, "forward", forward)
        return linear

    return patch


def test_the_linear_models_parts_are_what_they_are_meant_to_be():
    linear = Linear("inexact")
    q = linear.model.posterior(linear.rows)
    np.testing.assert_allclose(q.mean.detach(), linear.means(), rtol=1e-10)
    np.testing.assert_allclose(q.covariance_matrix[0].detach(), linear.scale @ linear.scale.T, rtol=1e-10)
    np.testing.assert_allclose(q.covariance_matrix[0].detach(), q.covariance_matrix[-1].detach(), rtol=1e-10)
    p = linear.model.decode(q.mean)
    np.testing.assert_allclose(p.mean.detach(), linear.means() @ linear.w.T + linear.b, rtol=1e-10)
    np.testing.assert_allclose(p.variance[0].detach(), np.diag(linear.psi), rtol=1e-6)


# --- one ELBO, three forms


def gaussian_kl(mean, covariance, other_mean, other):
    """KL(N(m, C) || N(n, D)) = 1/2 (tr D^-1 C + (n - m)' D^-1 (n - m) - K + log |D| / |C|)."""
    inverse, shift = np.linalg.inv(other), other_mean - mean
    logs = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + shift @ inverse @ shift - len(mean) + logs)


def three_forms(linear):
    """(B,) each, by numpy and scipy alone: the KL form, the entropy form, and log p(x) minus the gap."""
    zero, eye, covariance = np.zeros(K), np.eye(K), linear.scale @ linear.scale.T
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * K), -1).reshape(-1, K)
    joint = stats.multivariate_normal(  # of (z, x)
        np.concatenate([zero, linear.b]),
        np.block([[eye, linear.w.T], [linear.w, linear.w @ linear.w.T + linear.psi]]),
    )
    kl_form, entropy_form, gap_form = [], [], []
    posterior_mean = (linear.x - linear.b) @ (linear.exact @ linear.w.T @ np.linalg.inv(linear.psi)).T
    for x, mean, exact_mean, log_p in zip(linear.x, linear.means(), posterior_mean, linear.log_p(), strict=True):
        z = mean + signs @ linear.scale.T
        log_likelihood = np.mean([stats.multivariate_normal(linear.w @ code + linear.b, linear.psi).logpdf(x) for code in z])
        kl_form.append(log_likelihood - gaussian_kl(mean, covariance, zero, eye))
        log_joint = np.mean([joint.logpdf(np.concatenate([code, x])) for code in z])
        entropy_form.append(log_joint + stats.multivariate_normal(mean, covariance).entropy())
        gap_form.append(log_p - gaussian_kl(mean, covariance, exact_mean, linear.exact))
    return kl_form, entropy_form, gap_form


@pytest.mark.parametrize("q", ["exact", "inexact", "prior"])
def test_the_elbo_is_its_entropy_form_and_its_kl_form(q, at_nodes):
    """E_q[log p(x|z)] - KL(q||p(z)) = E_q[log p(x, z)] + H[q] = log p(x) - KL(q || p(z|x)), expectations of quadratics."""
    linear = at_nodes(Linear(q))
    found = elbo(linear.model, linear.rows, linear.rows, draws=2**K).detach().numpy()
    assert found.shape == (B,)
    for form in three_forms(linear):
        np.testing.assert_allclose(found, form, rtol=0, atol=1e-6)
    if q == "exact":
        np.testing.assert_allclose(found, linear.log_p(), rtol=0, atol=1e-6)  # the bound is tight


def test_what_training_minimises_is_the_negative_elbo(at_nodes):
    """l_X averaged over `samples` draws, plus kl."""
    linear = at_nodes(Linear("inexact"))
    linear.model.samples = 2**K
    trace = linear.model(Batch(x=linear.rows), frozenset({Need.RECONSTRUCTION}))
    (kl,) = fresh(
        resolved((D,), model={"encoder": {"name": "mlp", "posterior": "full"}, "regularizers": [{"name": "kl"}]})
    ).regularizers
    loss = (reconstruction(trace) + kl.penalty(trace)).detach().numpy()
    np.testing.assert_allclose(-loss, three_forms(linear)[1], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def curved():
    """A Bernoulli decoder on one latent dimension, whose integrals are one-dimensional: (model, x, values by quadrature)."""
    encoder = {"name": "mlp", "widths": [5], "activation": "tanh", "posterior": "diag"}
    decoder = {"name": "mlp", "likelihood": "bernoulli"}
    model = fresh(resolved((D,), model={"latent_dim": 1, "encoder": encoder, "decoder": decoder}), seed=3)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(3.0)  # torch's first weights give a decoder that hardly reads its code
        model.encoder.latent.linear.bias[1] = 1.0  # sd about 1.3: a narrow q makes weights p(z) / q(z|x) of heavy tails
    x = torch.from_numpy(np.random.default_rng(1).uniform(size=(5, D)).round())
    return model, x, [by_quadrature(model, row[None]) for row in x]


def by_quadrature(model, x):
    """{form: value} of one row, integrals by scipy over q +- 10 sd and over the prior +- 10."""
    with torch.no_grad():
        q = model.posterior(x)
        mean, std = float(q.mean), float(q.stddev)

        def log_likelihood(z):
            return float(model.decode(torch.tensor([[z]], dtype=torch.float64)).log_prob(x))

        log_q, log_prior = stats.norm(mean, std).logpdf, stats.norm().logpdf

        def expected(of):
            value, _ = integrate.quad(
                lambda z: math.exp(log_q(z)) * of(z), mean - 10 * std, mean + 10 * std, epsabs=1e-10, limit=200
            )
            return value

        evidence, _ = integrate.quad(lambda z: math.exp(log_likelihood(z) + log_prior(z)), -10, 10, epsabs=1e-14, limit=200)
        log_p = math.log(evidence)
        return {
            "kl": expected(log_likelihood) - expected(lambda z: log_q(z) - log_prior(z)),
            "entropy": expected(lambda z: log_likelihood(z) + log_prior(z)) + 0.5 * math.log(2 * math.pi * math.e * std**2),
            "gap": log_p - expected(lambda z: log_q(z) - (log_likelihood(z) + log_prior(z) - log_p)),
            "log_p": log_p,
        }


def test_the_forms_agree_where_nothing_is_linear(curved):
    _, _, values = curved
    for row in values:
        assert row["entropy"] == pytest.approx(row["kl"], abs=1e-6)
        assert row["gap"] == pytest.approx(row["kl"], abs=1e-6)
        assert row["kl"] < row["log_p"] - 0.01


def test_draws_of_a_curved_model_tend_to_the_integrals(curved):
    """The ELBO to its own within 4 s.e.; IWAE-S to log p(x): 1e5 draws leave a relative error of p(x) below 3 %."""
    model, x, values = curved
    torch.manual_seed(0)
    with torch.no_grad():
        many = torch.stack([elbo(model, x, x, draws=100) for _ in range(200)])
        sharp = importance_weighted_bound(model, x, x, draws=100_000)
    error = many.std(0) / len(many) ** 0.5
    assert ((many.mean(0) - torch.tensor([row["kl"] for row in values])).abs() < 4 * error).all()
    assert (error < 0.03).all()  # the gap between the two is about 1
    assert ((sharp - torch.tensor([row["log_p"] for row in values])).abs() < 0.03).all()


# --- the order of the bounds


REPEATS = 2000


@pytest.fixture(scope="module")
def ordered():
    """The inexact linear model, and (REPEATS,) means over its rows of each bound."""
    linear = Linear("inexact")
    torch.manual_seed(0)
    x = linear.rows.repeat(REPEATS, 1)
    with torch.no_grad():
        found = {"elbo": elbo(linear.model, x, x)}
        found |= {draws: importance_weighted_bound(linear.model, x, x, draws) for draws in (1, 2, 5, 20, 100)}
    return linear, {name: value.view(REPEATS, B).mean(1).numpy() for name, value in found.items()}


def standard_error(values):
    return values.std(ddof=1) / len(values) ** 0.5


def test_the_bounds_grow_with_the_draws_and_stay_below(ordered):
    """E[ELBO] < E[IWAE-2] < E[IWAE-5] < ... < log p(x), each step by more than 3 standard errors (Burda et al. 2016, thm. 1)."""
    linear, found = ordered
    for low, high in [("elbo", 2), (2, 5), (5, 20), (20, 100)]:
        error = math.hypot(standard_error(found[low]), standard_error(found[high]))
        assert found[high].mean() - found[low].mean() > 3 * error, (low, high)
    exact = linear.log_p().mean()
    for name, values in found.items():
        assert exact - values.mean() > 3 * standard_error(values), name
    assert exact - found[100].mean() < 0.05  # and 100 draws are nearly there


def test_one_draw_is_an_elbo(ordered):
    _, found = ordered
    error = math.hypot(standard_error(found["elbo"]), standard_error(found[1]))
    assert abs(found["elbo"].mean() - found[1].mean()) < 3 * error


def test_the_gap_of_the_elbo_is_known(ordered):
    """log p(x) - E[ELBO] = KL(q || p(z|x))."""
    linear, found = ordered
    assert abs(found["elbo"].mean() - np.mean(three_forms(linear)[2])) < 3 * standard_error(found["elbo"])


@pytest.mark.parametrize("draws", [1, 3, 100])
def test_with_the_exact_posterior_every_draw_is_log_p(draws):
    """p(x|z) p(z) / q(z|x) = p(x) for every z, so the bound has no noise."""
    linear = Linear("exact")
    torch.manual_seed(draws)
    found = importance_weighted_bound(linear.model, linear.rows, linear.rows, draws).detach()
    np.testing.assert_allclose(found, linear.log_p(), rtol=0, atol=1e-9)


# --- draws from the prior: p(x|z) averaged over S of them


def test_the_average_likelihood_converges_at_its_rate():
    """1/S sum_s p(x|z_s), z_s ~ N(0, I), has mean p(x) and variance v / S with v = E[p(x|z)^2] - p(x)^2 in closed form:
    N(x; m, P)^2 = (4 pi)^(-D/2) |P|^(-1/2) N(x; m, P/2), whose integral over z is N(x; b, W W' + P/2) times that factor.
    """
    linear = Linear("prior")
    p = np.exp(linear.log_p())
    narrow = stats.multivariate_normal(linear.b, linear.w @ linear.w.T + linear.psi / 2).pdf(linear.x)
    second = narrow * (4 * np.pi) ** (-D / 2) / np.sqrt(np.linalg.det(linear.psi))
    relative = second / p**2 - 1  # the variance of one p(x|z) / p(x)
    row = int(relative.argmin())  # the row whose estimate has the lightest tail
    torch.manual_seed(0)
    for draws, repeats in ((10, 4000), (100, 2000), (1000, 1000)):
        x = linear.rows[row].expand(repeats, D)
        with torch.no_grad():
            ratio = importance_weighted_bound(linear.model, x, x, draws).exp().numpy() / p[row]
        error = (relative[row] / draws) ** 0.5  # of one estimate: 1 / sqrt(S)
        assert abs(ratio.mean() - 1) < 4 * error / repeats**0.5
        assert ratio.std() == pytest.approx(error, rel=0.15), draws


# --- discrete codes


@pytest.mark.parametrize(("latent", "levels"), [(3, None), (6, 3)])
def test_bounds_of_symbols_by_counting_them_all(latent, levels):
    """Three bits, or two symbols of three values: sums over all codes give ELBO and log p(x), draws their estimates."""
    encoder = {"name": "hash", "widths": [5], "sampling": "gumbel", **({"levels": levels} if levels else {})}
    sections = {"latent_dim": latent, "encoder": encoder, "decoder": {"name": "mlp", "likelihood": "bernoulli"}}
    model = fresh(resolved((D,), model=sections), seed=3).eval()
    x = torch.from_numpy(np.random.default_rng(1).uniform(size=(3, D)).round())
    symbols = torch.eye(levels, dtype=torch.float64) if levels else torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    choices = itertools.product(range(len(symbols)), repeat=latent // symbols.shape[1])
    codes = torch.stack([symbols[torch.tensor(chosen)].flatten() for chosen in choices])
    torch.manual_seed(0)
    with torch.no_grad():
        q = model.posterior(x)
        log_q = q.log_prob(codes[:, None].expand(-1, 3, -1))  # (codes, 3)
        log_x = torch.stack([model.decode(code.expand(3, -1)).log_prob(x) for code in codes])
        exact = log_x.logsumexp(0) - math.log(len(codes))
        expected = (log_q.exp() * (log_x - math.log(len(codes)) - log_q)).sum(0)
        many = x.repeat(REPEATS, 1)
        low, high = elbo(model, many, many).view(REPEATS, 3), importance_weighted_bound(model, many, many, 5).view(REPEATS, 3)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(3, dtype=torch.float64))
    errors = {name: value.std(0) / REPEATS**0.5 for name, value in {"low": low, "high": high}.items()}
    assert ((low.mean(0) - expected).abs() < 4 * errors["low"]).all()
    assert (high.mean(0) > expected + 3 * errors["high"]).all()
    assert (high.mean(0) < exact + 3 * errors["high"]).all()
