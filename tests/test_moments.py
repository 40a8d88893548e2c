"""Batch moments against torch's own batch normalisation, and a pass that divides by them."""

import pytest
import torch
from torch import nn

import ssl_ae
from ssl_ae.moments import MOMENTUM, SMALLEST_VARIANCE
from ssl_ae.trace import Pass

B = 11
CASES = {  # shape of a layer: torch's module for it
    "vector": ((B, 7), nn.BatchNorm1d),
    "signal": ((B, 5, 13), nn.BatchNorm1d),
    "image": ((B, 3, 7, 5), nn.BatchNorm2d),
}
EVERY = pytest.mark.parametrize("kind", CASES)


def rows(shape, seed=0):
    """Channels of different centres and widths."""
    h = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    channel = torch.arange(1.0, shape[1] + 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return channel * h + channel**2


def pair(kind):
    """Ours and torch's, both fresh, in float64."""
    shape, batch_norm = CASES[kind]
    return ssl_ae.BatchMoments(shape[1]).double(), batch_norm(shape[1], affine=False).double(), shape


def normalised(moments, h, learn=True):
    mean, std = moments(h, learn)
    return (h - mean) / std


@EVERY
def test_in_training_they_are_batch_normalisation(kind):
    """Values and gradients."""
    ours, theirs, shape = pair(kind)
    h, weight = rows(shape), rows(shape, seed=1)
    results = []
    for norm in (lambda h: normalised(ours, h), theirs):
        leaf = h.clone().requires_grad_()
        value = norm(leaf)
        (slope,) = torch.autograd.grad((value.tanh() * weight).sum(), leaf)
        results.append((value, slope))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@EVERY
def test_in_evaluation_they_are_the_running_averages(kind):
    ours, theirs, shape = pair(kind)
    for seed in range(3):
        h = rows(shape, seed)
        normalised(ours, h)
        theirs(h)
    theirs.running_var.copy_(ours.var)  # torch's own is of unbiased variances, see below
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
    h = rows(shape, seed=5)
    torch.testing.assert_close(normalised(ours.eval(), h), theirs.eval()(h), rtol=1e-10, atol=1e-10)
    (alone,) = normalised(ours, h[:1])
    torch.testing.assert_close(alone, theirs(h)[0], rtol=1e-10, atol=1e-10)  # a row's value is its own


@EVERY
def test_running_variances_are_those_that_were_divided_by(kind):
    """Averages of the biased variance, n / (n - 1) smaller than torch's running ones (which start from 1, too)."""
    ours, theirs, shape = pair(kind)
    h = rows(shape)
    normalised(ours, h)
    theirs(h)
    count = h[:, 0].numel()
    unbiased = (theirs.running_var - (1 - MOMENTUM)) / MOMENTUM
    torch.testing.assert_close(ours.var, (1 - MOMENTUM) + MOMENTUM * unbiased * (count - 1) / count, rtol=1e-10, atol=0)


def test_the_constants_are_torchs():
    theirs = nn.BatchNorm1d(1)
    assert (theirs.momentum, theirs.eps) == (MOMENTUM, SMALLEST_VARIANCE)


def test_moments_have_a_place_for_every_axis():
    mean, std = ssl_ae.BatchMoments(3)(torch.randn(B, 3, 7, 5))
    assert mean.shape == std.shape == (3, 1, 1)
    assert ssl_ae.BatchMoments(7)(torch.randn(B, 7))[0].shape == (7,)


def test_a_pass_that_may_not_learn_leaves_them():
    moments = ssl_ae.BatchMoments(7).double()
    before = {name: value.clone() for name, value in moments.state_dict().items()}
    taught = normalised(moments, rows((B, 7)), learn=False)
    assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())
    assert torch.equal(taught, normalised(moments, rows((B, 7))))  # learning changes no answer in training
    assert not torch.equal(moments.mean, before["mean"])
    moments.eval()
    after = moments.mean.clone()
    normalised(moments, rows((B, 7), seed=1))
    assert torch.equal(moments.mean, after)  # evaluation never learns


def test_half_precision_is_averaged_in_float32():
    """1,000 + a little: bf16 has steps of 8 there, so squares and sums of it would be lost."""
    h = (1_000 + 30 * torch.randn(997, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, std = ssl_ae.BatchMoments(3)(h)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, h.float().mean(0))
    torch.testing.assert_close(std, h.float().std(0, correction=0))


def test_a_layer_that_never_varies_stays_finite():
    moments = ssl_ae.BatchMoments(3)
    h = torch.ones(B, 3, requires_grad=True)
    value = normalised(moments, h)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(B, 3))
    assert h.grad.isfinite().all()


# --- in a pass


class AddOne:
    """A regularizer's perturbation."""

    layers = ("h1",)

    def perturb(self, h, layer):
        return h + 1


def test_a_pass_divides_and_then_taps():
    """Noise comes after normalisation (Rasmus et al. 2015, alg. 1), and what was divided out is kept."""
    moments, h = ssl_ae.BatchMoments(7).double(), rows((B, 7))
    run = Pass(regularizers=[AddOne()])
    value = run.norm(h, "h1", moments)
    mean, std = run.stats["h1"]
    torch.testing.assert_close(value, (h - h.mean(0)) / (h.var(0, correction=0) + SMALLEST_VARIANCE).sqrt() + 1)
    assert torch.equal(run.taps["h1"], value)
    torch.testing.assert_close(mean, h.mean(0))
    torch.testing.assert_close((value - 1) * std + mean, h, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learn", [True, False])
def test_the_pass_says_who_learns(learn):
    moments = ssl_ae.BatchMoments(7).double()
    Pass(learn=learn).norm(rows((B, 7)), "h1", moments)
    assert moments.mean.any().item() == learn


# --- rows that are no uniform draw


@EVERY
def test_extra_rows_have_moments_of_their_own(kind):
    """Each kind as torch's batch normalisation of it alone, in value and gradient; the running averages are the uniform rows'."""
    ours, theirs, shape = pair(kind)
    _, others, _ = pair(kind)
    uniform = torch.arange(B) % 3 != 1
    h, weight = rows(shape), rows(shape, seed=1)
    h[~uniform] = 5 * h[~uniform] - 3
    a, b = h.clone().requires_grad_(), h.clone().requires_grad_()
    mean, std = ours(a, True, uniform)
    value = (a - mean) / std
    expected = torch.empty_like(h)
    expected[uniform], expected[~uniform] = theirs(b[uniform]), others(b[~uniform])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad((each.tanh() * weight).sum(), leaf)[0] for each, leaf in ((value, a), (expected, b))]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=1e-12, atol=1e-12)


def test_rows_of_one_kind_are_one_group():
    """All uniform: bit for bit as without the mask. All extra: the same numbers, and they are learnt, as there are no others."""
    h = rows((B, 7))
    plain, every, none = (ssl_ae.BatchMoments(7).double() for _ in range(3))
    mean, std = plain(h)
    same = every(h, True, torch.ones(B, dtype=torch.bool))
    assert all(map(torch.equal, (*same, every.mean), (mean, std, plain.mean)))
    extra = none(h, True, torch.zeros(B, dtype=torch.bool))
    torch.testing.assert_close(extra, (mean.expand(B, 7), std.expand(B, 7)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(none.state_dict()), dict(plain.state_dict()), rtol=1e-12, atol=1e-12)


def test_a_pass_tells_which_rows_are_uniform():
    moments, h, uniform = ssl_ae.BatchMoments(7).double(), rows((B, 7)), torch.arange(B) < 8
    value = Pass(uniform=uniform).norm(h, "h1", moments)
    torch.testing.assert_close(value[:8].mean(0), torch.zeros(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(value[8:].mean(0), torch.zeros(7).double(), rtol=0, atol=1e-12)
