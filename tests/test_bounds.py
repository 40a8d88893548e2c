"""How the bounds are computed: in parts, in evaluation mode, for any posterior and likelihood; and what has no bound."""

import numpy as np
import pytest
import torch
from engine_kit import fresh, resolved
from linear_kit import B, D, K, Linear
from scipy import stats
from torch.distributions import Independent, MultivariateNormal, Normal

from ssl_ae import bounds
from ssl_ae.bounds import elbo, importance_weighted_bound
from ssl_ae.latent import standard_normal


@pytest.mark.parametrize("bound", [elbo, importance_weighted_bound])
def test_draws_in_parts_are_draws_at_once(bound, monkeypatch):
    """One row's draws decoded by sixes and all together: the running logsumexp is the logsumexp."""
    linear, codes = Linear("inexact"), torch.randn(13, B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class FromCodes(MultivariateNormal):
        def rsample(self, sample_shape=torch.Size()):
            return torch.stack([next(self.left) for _ in range(*sample_shape)])

    encode = linear.model.encoder.forward

    def forward(x, run):
        q = encode(x, run)
        drawn = FromCodes(q.loc, scale_tril=q.scale_tril, validate_args=False)
        drawn.left = iter(codes)
        return drawn

    monkeypatch.setattr(linear.model.encoder, "forward", forward)

    def found(decoded):
        monkeypatch.setattr(bounds, "DECODED_ROWS", decoded)
        return bound(linear.model, linear.rows, linear.rows, 13).detach()

    together = found(10_000)
    for decoded in (1, B, 6 * B):
        torch.testing.assert_close(found(decoded), together, rtol=1e-12, atol=0)


def test_no_more_codes_are_decoded_at_once_than_said(monkeypatch):
    linear, seen = Linear("inexact"), []
    decode = linear.model.decode
    monkeypatch.setattr(linear.model, "decode", lambda z: seen.append(len(z)) or decode(z))
    importance_weighted_bound(linear.model, linear.rows, linear.rows, 5000)
    assert max(seen) <= bounds.DECODED_ROWS
    assert sum(seen) == 5000 * B


def test_the_formula_of_burda_by_hand():
    linear = Linear("inexact")
    torch.manual_seed(7)
    found = importance_weighted_bound(linear.model, linear.rows, linear.rows, 3).detach()
    torch.manual_seed(7)
    q = linear.model.posterior(linear.rows)
    terms = []
    for z in q.rsample(torch.Size([3])).detach():
        log_x = stats.norm.logpdf(linear.x, z.numpy() @ linear.w.T + linear.b, np.sqrt(np.diag(linear.psi))).sum(1)
        log_prior, log_q = stats.norm.logpdf(z.numpy()).sum(1), q.log_prob(z).detach().numpy()
        terms.append(np.exp(log_x + log_prior - log_q))
    np.testing.assert_allclose(found, np.log(np.mean(terms, 0)), rtol=1e-6)


def test_the_target_is_what_is_explained():
    """A denoising model reads x and explains the clean target."""
    linear = Linear("inexact")
    target = linear.rows.flip(0)
    for bound in (elbo, importance_weighted_bound):
        torch.manual_seed(0)
        own = bound(linear.model, linear.rows, linear.rows, 5)
        torch.manual_seed(0)
        other = bound(linear.model, linear.rows, target, 5)
        assert not torch.allclose(own, other)


def test_they_are_judged_in_evaluation_mode_and_leave_the_mode_alone():
    encoder = {"name": "mlp", "widths": [5], "batch_norm": True, "posterior": "diag"}
    noise = [{"name": "gaussian_noise", "scale": 3.0}]
    model = fresh(resolved((D,), model={"encoder": encoder, "regularizers": noise})).train()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(B, D)))
    torch.manual_seed(0)
    training = elbo(model, x, x)
    assert model.training
    torch.manual_seed(0)
    torch.testing.assert_close(elbo(model.eval(), x, x), training, rtol=0, atol=0)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
@pytest.mark.parametrize("posterior", ["diag", "full"])
def test_any_posterior_and_likelihood_in_images(posterior, likelihood):
    """Shapes; and IWAE-50 above IWAE-1 over many rows for any of them."""
    encoder = {"name": "mlp", "widths": [5], "posterior": posterior}
    decoder = {"name": "mlp", "likelihood": likelihood, **({"levels": 3} if likelihood == "categorical" else {})}
    found = resolved((2, 3, 5), model={"latent_dim": 3, "encoder": encoder, "decoder": decoder})
    model = fresh(found, dtype=torch.float32)
    torch.manual_seed(1)
    x = torch.rand(97, 2, 3, 5)
    with torch.no_grad():
        low, high = elbo(model, x, x, 2), importance_weighted_bound(model, x, x, 50)
    assert low.shape == high.shape == (97,)
    assert low.dtype == high.dtype == torch.float32
    assert high.mean() > low.mean()


def test_they_have_gradients():
    """Training by the bound is Burda's IWAE: nothing in here stops a gradient."""
    linear = Linear("inexact")
    for bound in (elbo, importance_weighted_bound):
        linear.model.zero_grad()
        bound(linear.model, linear.rows, linear.rows, 3).mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in linear.model.decoder.parameters())
        assert linear.model.encoder.latent.linear.bias.grad.abs().sum() > 0


def test_a_certain_code_has_no_bound():
    model = fresh(resolved((D,)))
    x = torch.zeros(B, D, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"Point has no density over R\^K.*diag or full"):
        importance_weighted_bound(model, x, x, 3)
    with pytest.raises(TypeError, match="Point has no density"):
        elbo(model, x, x)


def test_no_draws_are_no_bound():
    linear = Linear("inexact")
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        elbo(linear.model, linear.rows, linear.rows, 0)


def test_the_prior_is_the_standard_normal():
    z = torch.randn(5, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prior = standard_normal(z)
    assert prior.event_shape == (K,)
    assert isinstance(prior, Independent)
    assert isinstance(prior.base_dist, Normal)
    np.testing.assert_allclose(prior.log_prob(z), stats.norm.logpdf(z.numpy()).sum(-1), rtol=1e-12)
