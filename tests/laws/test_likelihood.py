"""p(x|z) against scipy's densities and against sums over all outcomes; images of 2 x 3 x 5, vectors of 7."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Independent

from ssl_ae import likelihood
from ssl_ae.likelihood import SMALLEST_STD, Likelihood

B, IMAGE, VECTOR = 11, (2, 3, 5), (7,)
SHAPES = pytest.mark.parametrize("shape", [IMAGE, VECTOR], ids=["image", "vector"])


def raws(parameters, shape, seed=0):
    return torch.randn(B, parameters, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples(shape, seed=1):
    return torch.randn(B, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softplus(a):
    return np.log1p(np.exp(a))


def per_row(values):
    return values.reshape(B, -1).sum(1)


@SHAPES
def test_the_unit_gaussian_is_half_the_squared_error_and_its_constant(shape):
    raw, x = raws(1, shape), samples(shape)
    p = Likelihood("gaussian", shape)(raw)
    assert p.batch_shape == (B,)
    assert p.event_shape == shape
    expected = 0.5 * (x - raw[:, 0]).square().flatten(1).sum(1) + 0.5 * math.prod(shape) * math.log(2 * math.pi)
    torch.testing.assert_close(-p.log_prob(x), expected, rtol=1e-12, atol=0)
    assert torch.equal(p.mean, raw[:, 0])


@SHAPES
@pytest.mark.parametrize("variance", ["scalar", "feature", "decoder"])
def test_a_learned_variance_is_scipys_normal(shape, variance):
    output = Likelihood("gaussian", shape, variance).double()
    raw, x = raws(output.parameters_per_value, shape), samples(shape)
    if variance == "decoder":
        assert raw.shape[1] == 2
        unbounded = raw[:, 1].numpy()
    else:
        assert output.raw_std.numel() == (1 if variance == "scalar" else math.prod(shape))
        with torch.no_grad():
            output.raw_std.copy_(torch.randn(output.raw_std.shape, generator=torch.Generator().manual_seed(2)))
        assert output.raw_std.dim() == 1  # like a bias: neither weight decay nor the penalty of weights may pull at a variance
        unbounded = output.raw_std.detach().numpy().reshape(shape if variance == "feature" else ())
    expected = stats.norm.logpdf(x.numpy(), raw[:, 0].numpy(), softplus(unbounded) + SMALLEST_STD)
    np.testing.assert_allclose(output(raw).log_prob(x).detach().numpy(), per_row(expected), rtol=1e-10)


def test_a_learned_variance_starts_at_one_and_ends_at_the_mean_squared_error():
    """The maximum-likelihood variance of residuals r is mean r^2: the gradient of raw_std vanishes there and nowhere else."""
    output = Likelihood("gaussian", VECTOR, "scalar").double()
    start = output(raws(1, VECTOR)).base_dist.scale
    torch.testing.assert_close(start, torch.ones_like(start), rtol=0, atol=SMALLEST_STD + 1e-6)
    raw, x = raws(1, VECTOR), 3 * samples(VECTOR)
    std = (x - raw[:, 0]).square().mean().sqrt()
    for factor, sign in ((1.0, 0), (0.9, -1), (1.1, 1)):
        with torch.no_grad():
            output.raw_std.fill_(math.log(math.expm1(factor * float(std) - SMALLEST_STD)))
        (gradient,) = torch.autograd.grad(-output(raw).log_prob(x).mean(), output.raw_std)
        assert math.copysign(1, float(gradient)) == sign if sign else abs(float(gradient)) < 1e-9


@SHAPES
def test_bernoulli_on_bits_is_scipys(shape):
    raw, x = raws(1, shape), (samples(shape) > 0).double()
    expected = stats.bernoulli.logpmf(x.numpy(), 1 / (1 + np.exp(-raw[:, 0].numpy())))
    np.testing.assert_allclose(Likelihood("bernoulli", shape)(raw).log_prob(x).numpy(), per_row(expected), rtol=1e-10)


@SHAPES
def test_bernoulli_on_grey_values_is_the_cross_entropy(shape):
    raw, x = raws(1, shape), torch.sigmoid(samples(shape))
    q = 1 / (1 + np.exp(-raw[:, 0].numpy()))
    expected = x.numpy() * np.log(q) + (1 - x.numpy()) * np.log(1 - q)
    np.testing.assert_allclose(Likelihood("bernoulli", shape)(raw).log_prob(x).numpy(), per_row(expected), rtol=1e-10)


def test_the_cross_entropy_is_smallest_where_the_mean_is_x():
    x = torch.sigmoid(samples(VECTOR))
    raw = torch.logit(x).unsqueeze(1).requires_grad_()
    p = Likelihood("bernoulli", VECTOR)(raw)
    torch.testing.assert_close(p.mean, x, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(p.log_prob(x).sum(), raw)
    assert gradient.abs().max() < 1e-12


def test_probabilities_of_all_levels_add_up_to_one():
    levels = 13
    output = Likelihood("categorical", (1,), levels=levels)
    raw = raws(levels, (1,))
    p = output(raw)
    grid = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    mass = torch.stack([p.log_prob(value.expand(B, 1)).exp() for value in grid])
    torch.testing.assert_close(mass.sum(0), torch.ones(B, dtype=torch.float64), rtol=1e-12, atol=0)
    expected = (mass * grid[:, None]).sum(0)
    torch.testing.assert_close(p.mean[:, 0], expected, rtol=1e-12, atol=0)


@SHAPES
@pytest.mark.parametrize("levels", [2, 256])
def test_levels_are_a_softmax_for_each_number(shape, levels):
    raw = raws(levels, shape)
    x = torch.randint(levels, (B, *shape), generator=torch.Generator().manual_seed(3))
    logits = np.moveaxis(raw.numpy(), 1, -1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, x.numpy()[..., None], -1)
    p = Likelihood("categorical", shape, levels=levels)(raw)
    assert p.batch_shape == (B,)
    assert p.event_shape == shape
    np.testing.assert_allclose(p.log_prob(x.double() / (levels - 1)).numpy(), per_row(expected), rtol=1e-10)
    assert p.mean.shape == (B, *shape)


def test_samples_of_levels_have_their_mean():
    levels, draws = 5, 20_000
    p = Likelihood("categorical", VECTOR, levels=levels)(raws(levels, VECTOR))
    torch.manual_seed(0)
    drawn = p.sample(torch.Size([draws])).double()
    bound = 4 * 0.5 / draws**0.5  # a value of [0, 1] has a standard deviation of at most 1/2
    assert (drawn.mean(0) - p.mean).abs().max() < bound


@SHAPES
@pytest.mark.parametrize("family", ["unit", "scalar", "feature", "decoder", "bernoulli"])
@pytest.mark.parametrize("block", [1, 71, 10**6], ids=["a row each", "uneven", "one block"])
def test_blocks_of_rows_change_nothing(shape, family, block, monkeypatch):
    """Value, gradient and its derivative are those of torch's own sum over all numbers at once."""
    monkeypatch.setattr(likelihood, "BLOCK", block)
    name, variance = ("bernoulli", "unit") if family == "bernoulli" else ("gaussian", family)
    output = Likelihood(name, shape, variance).double()
    raw, x = raws(output.parameters_per_value, shape).requires_grad_(), torch.sigmoid(samples(shape))
    results = []
    for log_prob in (lambda p: p.log_prob(x), lambda p: Independent.log_prob(p, x)):
        value = log_prob(output(raw))
        (slope,) = torch.autograd.grad(value.sum(), raw, create_graph=True)
        (bend,) = torch.autograd.grad(slope.square().sum(), raw)
        results.append((value, slope, bend))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_samples_with_further_dimensions_are_torchs():
    p, x = Likelihood("gaussian", IMAGE)(raws(1, IMAGE)), torch.stack([samples(IMAGE, seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(p.log_prob(x), torch.stack([p.log_prob(each) for each in x]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_half_precision_becomes_a_density_in_float32(name):
    output = Likelihood(name, VECTOR, levels=3)
    raw = raws(output.parameters_per_value, VECTOR).bfloat16()
    value = output(raw).log_prob(torch.full((B, *VECTOR), 0.5))
    assert value.dtype == torch.float32
    assert torch.equal(value, output(raw.float()).log_prob(torch.full((B, *VECTOR), 0.5)))
