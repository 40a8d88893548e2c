"""q(z|x): moments of draws, and KL(q || N(0, I)) against torch's closed forms and against quadrature."""

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy import integrate, stats
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from ssl_ae.latent import SMALLEST_SCALE, Latent, Point, kl_to_standard_normal

B, H, K = 3, 7, 5
DRAWS = 100_000


def posterior(kind, latent=K, seed=0):
    """q of B rows from a layer with random weights."""
    torch.manual_seed(seed)
    layer = Latent(H, latent, kind).double()
    with torch.no_grad():
        return layer(torch.randn(B, H, dtype=torch.float64) * 2)


def covariance(q):
    return q.covariance_matrix if isinstance(q, MultivariateNormal) else torch.diag_embed(q.variance)


@pytest.mark.parametrize("kind", ["point", "diag", "full"])
def test_shapes(kind):
    q = posterior(kind)
    assert q.batch_shape == (B,)
    assert q.event_shape == (K,)
    assert q.rsample(torch.Size([2])).shape == (2, B, K)
    assert q.stddev.shape == q.variance.shape == q.mean.shape == (B, K)


def test_a_point_is_certain():
    q = posterior("point")
    assert torch.equal(q.rsample(), q.mean)
    assert not q.stddev.any()
    assert isinstance(q, Point)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_moments_of_draws(kind):
    """1e5 draws, within 5 standard errors: sd / sqrt(n) of a mean, at most sqrt(2) sd_i sd_j / sqrt(n) of a covariance."""
    q = posterior(kind)
    torch.manual_seed(1)
    z = q.rsample(torch.Size([DRAWS]))
    mean, std = z.mean(0), q.variance.sqrt()
    assert ((mean - q.mean).abs() < 5 * std / DRAWS**0.5).all()
    centred = z - mean
    found = torch.einsum("sbi,sbj->bij", centred, centred) / DRAWS
    spread = std[:, :, None] * std[:, None, :]
    assert ((found - covariance(q)).abs() < 5 * 2**0.5 * spread / DRAWS**0.5).all()


def test_eps_scales_the_standard_deviation():
    """z - mu = sigma * eps with eps drawn from the same seed; sigma^2 * eps would be the slip."""
    q = posterior("diag")
    torch.manual_seed(4)
    z = q.rsample()
    torch.manual_seed(4)
    eps = torch.randn(B, K, dtype=torch.float64)
    torch.testing.assert_close(z, q.mean + q.stddev * eps, rtol=1e-12, atol=0)


def test_full_draws_are_mu_plus_l_eps():
    q = posterior("full")
    torch.manual_seed(4)
    z = q.rsample()
    torch.manual_seed(4)
    eps = torch.randn(B, K, dtype=torch.float64)
    expected = q.mean + torch.stack([scale @ e for scale, e in zip(q.scale_tril, eps, strict=True)])
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=0)
    assert (q.scale_tril.diagonal(dim1=1, dim2=2) > 0).all()
    assert not q.scale_tril.triu(1).any()


def test_scales_are_softplus_of_the_layer():
    torch.manual_seed(0)
    layer, h = Latent(H, K, "diag").double(), torch.randn(B, H, dtype=torch.float64)
    raw = (h @ layer.linear.weight.T + layer.linear.bias).detach().numpy()
    np.testing.assert_allclose(layer(h).mean.detach().numpy(), raw[:, :K], rtol=1e-12)
    np.testing.assert_allclose(layer(h).stddev.detach().numpy(), np.log1p(np.exp(raw[:, K:])) + SMALLEST_SCALE, rtol=1e-10)


@pytest.mark.parametrize("latent", [1, K])
@pytest.mark.parametrize("kind", ["diag", "full"])
def test_densities_and_entropies_are_scipys(kind, latent):
    """One dimension is the univariate normal, whichever kind is asked for."""
    q = posterior(kind, latent)
    z = torch.randn(7, B, latent, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for i in range(B):
        normal = stats.multivariate_normal(q.mean[i].numpy(), covariance(q)[i].numpy())
        np.testing.assert_allclose(q.log_prob(z)[:, i].numpy(), normal.logpdf(z[:, i].numpy()), rtol=1e-9)
        assert float(q.entropy()[i]) == pytest.approx(normal.entropy(), rel=1e-9)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_kl_is_torchs_closed_form(kind):
    q = posterior(kind)
    if kind == "full":
        prior = MultivariateNormal(torch.zeros(K, dtype=torch.float64), torch.eye(K, dtype=torch.float64))
    else:
        prior = Independent(Normal(torch.zeros(K, dtype=torch.float64), torch.ones(K, dtype=torch.float64)), 1)
    assert kl_to_standard_normal(q).shape == (B,)
    torch.testing.assert_close(kl_to_standard_normal(q), kl_divergence(q, prior), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_kl_in_one_dimension_by_quadrature(kind):
    q = posterior(kind, latent=1)
    mean, std = q.mean[:, 0].tolist(), q.variance[:, 0].sqrt().tolist()
    for i in range(B):
        density, prior = stats.norm(mean[i], std[i]), stats.norm()
        value, _ = integrate.quad(
            lambda z, p=density, r=prior: p.pdf(z) * (p.logpdf(z) - r.logpdf(z)),
            mean[i] - 12 * std[i],
            mean[i] + 12 * std[i],
            epsabs=1e-12,
        )
        assert float(kl_to_standard_normal(q)[i]) == pytest.approx(value, abs=1e-9)


def test_full_kl_in_two_dimensions_by_gauss_hermite():
    """E_q[log q - log p] with scipy's densities: the integrand is quadratic, so three nodes a dimension are exact."""
    q = posterior("full", latent=2)
    nodes, node_weights = hermegauss(3)
    eps = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    mass = np.outer(node_weights, node_weights).ravel() / (2 * np.pi)
    for i in range(B):
        mean, scale = q.mean[i].numpy(), q.scale_tril[i].numpy()
        z = mean + eps @ scale.T
        log_q = stats.multivariate_normal(mean, scale @ scale.T).logpdf(z)
        log_p = stats.multivariate_normal(np.zeros(2), np.eye(2)).logpdf(z)
        assert float(kl_to_standard_normal(q)[i]) == pytest.approx(float(mass @ (log_q - log_p)), abs=1e-10)


def test_full_without_off_diagonal_is_diag():
    torch.manual_seed(0)
    diag, full = Latent(H, K, "diag").double(), Latent(H, K, "full").double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(full.linear, name)
            value.zero_()
            value[: 2 * K] = getattr(diag.linear, name)
    h = torch.randn(B, H, dtype=torch.float64)
    a, b = diag(h), full(h)
    torch.testing.assert_close(kl_to_standard_normal(b), kl_to_standard_normal(a), rtol=1e-12, atol=0)
    z = a.rsample()
    torch.testing.assert_close(b.log_prob(z), a.log_prob(z), rtol=1e-12, atol=0)
    torch.testing.assert_close(b.mean, a.mean, rtol=0, atol=0)
    torch.testing.assert_close(b.variance, a.variance, rtol=1e-12, atol=0)


def test_kl_of_the_prior_itself_is_zero():
    one, zero = torch.ones(B, K), torch.zeros(B, K)
    assert not kl_to_standard_normal(Independent(Normal(zero, one), 1)).any()
    assert not kl_to_standard_normal(MultivariateNormal(zero, scale_tril=torch.diag_embed(one))).any()


def test_a_point_has_no_kl():
    with pytest.raises(TypeError, match="Point has no density"):
        kl_to_standard_normal(posterior("point"))


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_scales_survive_half_precision_and_extreme_layers(kind):
    layer = Latent(1, K, kind).bfloat16()
    with torch.no_grad():
        layer.linear.bias.fill_(-100.0)
    q = layer(torch.zeros(B, 1, dtype=torch.bfloat16))
    assert q.mean.dtype == torch.float32
    assert torch.isfinite(kl_to_standard_normal(q)).all()
