"""Factor analysis and probabilistic PCA: the exact posterior by conditioning, a tight bound, and maximum likelihood."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, resolved, trainer_of
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis
from ssl_ae_builtins.factor_analysis import FactorAnalysisDecoder, inverse_scale_tril

from ssl_ae import Batch, Shapes
from ssl_ae.errors import RecipeError
from ssl_ae.latent import standard_normal
from ssl_ae.objective import reconstruction
from ssl_ae.trace import Need

SHAPE, SIZE, LATENT = (2, 7), 14, 3
KINDS = ("feature", "scalar")
EVERYTHING = frozenset({Need.RECONSTRUCTION})


def recipe(noise="feature", shape=SHAPE, latent=LATENT, **sections):
    model = {
        "latent_dim": latent,
        "encoder": {"name": "factor_analysis"},
        "decoder": {"name": "factor_analysis", "noise": noise},
        "regularizers": [{"name": "kl"}],
    }
    return resolved(shape=shape, model=model, **sections)


def model_of(noise, shape=SHAPE, latent=LATENT, dtype=torch.float64):
    """Weights of the size that trained ones have; noise variances between 0.05 and 1."""
    model = fresh(recipe(noise, shape, latent), head=False, dtype=dtype)
    with torch.no_grad():
        model.decoder.log_noise.uniform_(-3, 0)
    return model


def parameters(model):
    """W, b, Psi as arrays."""
    linear = model.decoder.linear
    return [value.detach().double().numpy() for value in (linear.weight, linear.bias, model.decoder.noise())]


def marginal(model):
    """p(x) = N(b, W W' + Psi), differentiable in the parameters."""
    linear = model.decoder.linear
    covariance = linear.weight @ linear.weight.T + model.decoder.noise().diag()
    return torch.distributions.MultivariateNormal(linear.bias, covariance)


def rows(count=11, shape=SHAPE, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


# --- the posterior


@pytest.mark.parametrize(("noise", "latent"), list(product(KINDS, (1, LATENT, 17))))
def test_the_posterior_is_the_joint_gaussian_conditioned_on_x(noise, latent):
    """(z, x) is normal with covariance [[I, W'], [W, C]], C = W W' + Psi: E[z|x] = W' C^-1 (x - b), cov = I - W' C^-1 W."""
    model, x = model_of(noise, latent=latent), rows()
    w, b, psi = parameters(model)
    gain = w.T @ np.linalg.inv(w @ w.T + np.diag(psi))
    q = model.posterior(x)
    np.testing.assert_allclose(q.mean.detach(), (x.flatten(1).numpy() - b) @ gain.T, atol=1e-12)
    expected = np.broadcast_to(np.eye(latent) - gain @ w, (len(x), latent, latent))
    np.testing.assert_allclose(q.covariance_matrix.detach(), expected, atol=1e-12)
    assert len(psi) == SIZE
    assert len(np.unique(psi)) == (SIZE if noise == "feature" else 1)


@pytest.mark.parametrize("noise", KINDS)
def test_the_joint_over_the_posterior_is_the_marginal_for_every_z(noise):
    """log p(x, z) - log q(z|x) = log N(x; b, W W' + Psi), also for z far from any draw. scipy's density."""
    model, x = model_of(noise), rows()
    w, b, psi = parameters(model)
    expected = multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(x.flatten(1).numpy())
    q = model.posterior(x)
    for z in (q.rsample(), q.mean, torch.zeros_like(q.mean), 30 * rows(shape=(LATENT,), seed=1)):
        joint = model.decode(z).log_prob(x) + standard_normal(z).log_prob(z)
        np.testing.assert_allclose((joint - q.log_prob(z)).detach(), expected, rtol=1e-10)


# --- the bound


@pytest.mark.parametrize("noise", KINDS)
def test_the_objective_is_the_negative_log_likelihood_in_value_and_gradient(noise):
    """l_X + kl as the engine computes them, averaged over z = mean +- sqrt(K) L e_k: l_X is quadratic in z, so that these 2 K
    points, whose mean and covariance are those of q, give its expectation exactly."""
    model, x = model_of(noise), rows()
    batch = Batch(x=x)
    trace = model(batch, EVERYTHING)
    steps = LATENT**0.5 * trace.q.scale_tril.mT  # (B, K, K), a step a row
    draws = torch.cat([trace.q.mean + steps.transpose(0, 1), trace.q.mean - steps.transpose(0, 1)])  # (2 K, B, K)
    exact = dataclasses.replace(trace, draws=draws, p_x=trace.decode(draws[0]))
    (kl,) = model.regularizers
    bound = reconstruction(exact) + kl.penalty(exact)
    likelihood = marginal(model).log_prob(x.flatten(1))
    torch.testing.assert_close(bound, -likelihood, rtol=1e-11, atol=0)
    named = dict(model.named_parameters())
    assert all(name.startswith("decoder.") for name in named)
    found = torch.autograd.grad(bound.sum(), named.values())
    truth = torch.autograd.grad(-likelihood.sum(), named.values())
    for name, ours, theirs in zip(named, found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


# --- precision


def test_small_noise_and_large_loadings_in_float32():
    """I + W'Psi^-1 W with eigenvalues up to 1e5: the bound in float32 against the marginal in float64, in nats a row."""
    model = model_of("feature")
    with torch.no_grad():
        model.decoder.linear.weight.mul_(4)
        model.decoder.log_noise.fill_(-20)  # Psi is the floor, 1e-3
    w, _, psi = parameters(model)
    np.testing.assert_allclose(psi, 1e-3, rtol=1e-5)
    assert 1e4 < np.linalg.eigvalsh(w.T @ (w / psi[:, None])).max() < 1e6
    x = marginal(model).sample((11,)).view(11, *SHAPE)
    expected = marginal(model).log_prob(x.flatten(1)).detach()
    single, x = model.float(), x.float()
    q = single.posterior(x)
    z = q.rsample()
    found = single.decode(z).log_prob(x) + standard_normal(z).log_prob(z) - q.log_prob(z)
    assert q.mean.dtype == torch.float32
    torch.testing.assert_close(found.double().detach(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("noise", KINDS)
def test_autocast_changes_nothing(noise):
    model, x = model_of(noise, dtype=torch.float32), rows().float()
    q = model.posterior(x)
    p = model.decode(q.mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model.posterior(x)
        p_again = model.decode(q.mean)
    for before, after in (
        (q.mean, again.mean),
        (q.scale_tril, again.scale_tril),
        (p.mean, p_again.mean),
        (p.stddev, p_again.stddev),
    ):
        assert torch.equal(before, after)


def test_the_inverse_of_a_cholesky_factor():
    """C is lower-triangular with C C' P = I; what is not positive definite gives NaN, which the loop counts, and no exception."""
    a = rows(5, (17,)).T
    p = torch.eye(5, dtype=torch.float64) + a.T @ a
    c = inverse_scale_tril(p)
    torch.testing.assert_close(c @ c.T @ p, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(c, c.tril())
    assert (c.diagonal() > 0).all()
    assert inverse_scale_tril(p - 1000 * torch.eye(5)).isnan().all()


# --- maximum likelihood


@pytest.fixture(scope="module")
def digits():
    """Standardised digits without the pixels that never vary: 1,200 rows to learn from and 597 held out."""
    x = load_digits().data
    train, held_out = x[:1200], x[1200:]
    varies = train.std(0) > 0
    mean, std = train[:, varies].mean(0), train[:, varies].std(0)
    return (train[:, varies] - mean) / std, (held_out[:, varies] - mean) / std


def trained(x, noise, latent, steps=600):
    """W, b, Psi after full-batch Adam on l_X + kl with one draw of z a row, through the real loop."""
    training = {
        "epochs": steps,
        "batch_size": len(x),
        "optimizer": {"name": "adam", "lr": 0.03},
        "schedule": {"name": "cosine"},
        "log_every": steps,
    }
    found = recipe(noise, x.shape[1:], latent, pretrain=training)
    trainer = trainer_of(found, "pretrain", feed_of(x), fresh(found, head=False))
    trainer.run()
    return parameters(trainer.model)


def test_training_reaches_scikit_learns_likelihood(digits):
    """Held-out log-likelihood within 0.05 nats a row of EM at its fixed point; scikit-learn's noise stays above our floor."""
    train, held_out = digits
    w, b, psi = trained(train, "feature", latent=5)
    truth = FactorAnalysis(5, tol=1e-8, max_iter=20_000, svd_method="lapack").fit(train)
    assert truth.noise_variance_.min() > 1e-3
    ours = multivariate_normal(b, w @ w.T + np.diag(psi))
    assert ours.logpdf(held_out).mean() == pytest.approx(truth.score(held_out), abs=0.05)
    assert truth.score(train) - 0.05 < ours.logpdf(train).mean() < truth.score(train) + 1e-3  # nothing exceeds the maximum


def test_training_reaches_the_closed_form_of_probabilistic_pca(digits):
    """s^2 is the mean of the discarded eigenvalues and W W' = U (L - s^2 I) U' (Tipping & Bishop 1999, sec. 3.2)."""
    train, latent = digits[0], 5
    w, b, psi = trained(train, "scalar", latent)
    values, axes = np.linalg.eigh(np.cov(train.T, bias=True))
    noise, leading = values[:-latent].mean(), axes[:, -latent:]
    best = (leading * (values[-latent:] - noise)) @ leading.T
    assert psi[0] == pytest.approx(noise, rel=2e-3)
    np.testing.assert_allclose(w @ w.T, best, atol=0.01 * values[-1])
    np.testing.assert_allclose(b, train.mean(0), atol=0.01)
    likelihood = multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(train).mean()
    maximum = multivariate_normal(train.mean(0), best + noise * np.eye(len(best))).logpdf(train).mean()
    assert maximum - 0.01 < likelihood <= maximum


def test_numbers_that_never_vary_end_at_the_floor():
    x = np.random.default_rng(0).normal(size=(211, 7))
    x[:, 3] = 0.5
    _, b, psi = trained(x, "feature", latent=2)
    assert psi[3] == pytest.approx(1e-3, rel=1e-6)
    assert psi[[0, 1, 2, 4, 5, 6]].min() > 0.05
    assert b[3] == pytest.approx(0.5, abs=0.01)


def test_variances_below_the_floor_can_rise_again():
    """With Psi at the floor and rows far outside it, likelihood grows with each variance: descent must raise every r."""
    model = model_of("feature")
    with torch.no_grad():
        model.decoder.log_noise.fill_(-9)
    assert model.decoder.noise().tolist() == pytest.approx([1e-3] * SIZE)
    (gradient,) = torch.autograd.grad(-marginal(model).log_prob(rows(101).flatten(1)).mean(), [model.decoder.log_noise])
    assert (gradient < 0).all()


# --- pictures and complaints


@pytest.mark.parametrize("shape", [(3, 5, 7), (11,), (2, 13)])
def test_pictures(shape):
    """Turned loadings have the same W W' and are orthogonal, largest first; the rest shows Psi."""
    decoder = model_of("feature", shape).decoder
    loadings, noise = decoder.pictures(None)
    tiles, w = loadings.tiles.flatten(1).double(), decoder.linear.weight.detach()
    assert loadings.tiles.shape == (LATENT, *shape)
    torch.testing.assert_close(tiles.T @ tiles, w @ w.T, rtol=0, atol=1e-5)
    sizes = (tiles @ tiles.T).diagonal()
    torch.testing.assert_close(tiles @ tiles.T, sizes.diag(), rtol=0, atol=1e-5)
    assert (sizes.diff() <= 0).all()
    assert torch.equal(noise.tiles.flatten(), decoder.noise().detach())
    assert (loadings.signed, noise.signed, tuple(noise.tiles.shape)) == (True, False, (1, *shape))


def test_the_picture_of_one_variance_is_the_spectrum():
    model = model_of("scalar")
    _, picture = model.decoder.pictures(None)
    w, _, psi = parameters(model)
    of_model, of_noise = picture.lines.values()
    np.testing.assert_allclose(of_model, np.linalg.eigvalsh(w @ w.T + np.diag(psi))[::-1][:LATENT], rtol=1e-5)
    np.testing.assert_allclose(of_noise, np.full(LATENT, psi[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            {"decoder": {"name": "linear"}},
            r"model\.decoder\.name = builtins/linear: .* Set model\.decoder: {name: factor_analysis}",
        ),
        ({"regularizers": []}, r"the weight of kl is 0 in all: .* with weight 1"),
        ({"regularizers": [{"name": "kl", "weight": 0.5}]}, r"the weight of kl is 0\.5 in all"),
    ],
)
def test_what_is_not_factor_analysis_is_refused(model, complaint):
    parts = {"encoder": {"name": "factor_analysis"}, "decoder": {"name": "factor_analysis"}, "regularizers": [{"name": "kl"}]}
    with pytest.raises(RecipeError, match=complaint):
        resolved(model=parts | model)


def test_another_encoder_may_approximate_the_posterior():
    """A linear Gaussian model under an amortised q: its bound is loose, so that bounds can be compared with the truth."""
    found = resolved(model={"encoder": {"name": "linear", "posterior": "diag"}, "decoder": {"name": "factor_analysis"}})
    assert found.decoder.cls is FactorAnalysisDecoder
    assert FactorAnalysisDecoder(found.decoder.config, Shapes((7,), 3)).noise().tolist() == [1.0] * 7
