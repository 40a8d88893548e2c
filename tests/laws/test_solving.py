"""The minimum of a convex head: optimality, scikit-learn's solution, closed forms, and what must not change it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from ssl_ae_builtins.heads import BernoulliHead, Gaussian, Softmax

from ssl_ae import Batch, Shapes, solving
from ssl_ae.errors import NonFiniteError
from ssl_ae.objective import supervised
from ssl_ae.optimizing import build_optimizer
from ssl_ae.recipe import Optimizer, Solver
from ssl_ae.solving import solve
from ssl_ae.trace import Trace

N, K, C, T = 211, 5, 3, 2
EXACT = Solver(name="lbfgs", tolerance=1e-8)
DECAY = 0.03


def latents(seed=0, rows=N):
    """(rows, K) float64 that lean on one another, with means and deviations of 0.01 to 100."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(rows, K)) @ (np.eye(K) + 0.8 * random.normal(size=(K, K)))
    return torch.from_numpy((mixed + 2.0) * 10.0 ** np.arange(-2, 3))


def labels(z, seed=1):
    """(rows,) classes that the latents tell in part."""
    random = np.random.default_rng(seed)
    standard = ((z - z.mean(0)) / z.std(0)).numpy()
    return torch.from_numpy((standard @ random.normal(size=(K, C)) + 2 * random.gumbel(size=(len(z), C))).argmax(1))


def targets(z, seed=1):
    """(rows, T) linear in the latents with noise, every seventh unknown."""
    random = np.random.default_rng(seed)
    standard = ((z - z.mean(0)) / z.std(0)).numpy()
    y = 700 + 40 * (standard @ random.normal(size=(K, T)) + random.normal(size=(len(z), T)))
    y[::7, 0] = np.nan
    return torch.from_numpy(y)


def head(cls, latent=K, **options):
    torch.manual_seed(0)
    outputs = {"classes": C} if cls is Softmax else {"targets": T}
    return cls(cls.Config(**options), Shapes((7,), latent, **outputs)).double()


def problem(cls):
    """A prepared head and the labelled rows of its task."""
    z = latents()
    if cls is Softmax:
        return head(cls), Batch(x=z, y=labels(z))
    found, y = head(cls, **({"variance": "unit"} if cls is Gaussian else {})), targets(z)
    if cls is BernoulliHead:
        return found, Batch(x=z, y=(y > 700).double().where(~y.isnan(), torch.nan))
    found.prepare(y)
    return found, Batch(x=z, y=y)


def objective(found, batch, decay):
    """f by the head's own forward pass and the engine's own term."""
    l_y = supervised(Trace(model=None, batch=batch, p_y=found(batch.x))).mean()
    return l_y + decay / 2 * found.linear.weight.square().sum()


def gradients(found, batch, decay):
    """of f in W, in units of the curvature in each latent, and in b."""
    weight, bias = torch.autograd.grad(objective(found, batch, decay), [found.linear.weight, found.linear.bias])
    return weight / (batch.x.var(0) + 2 * decay).sqrt(), bias


CLASSES = pytest.mark.parametrize("cls", [Softmax, BernoulliHead, Gaussian])


@CLASSES
@pytest.mark.parametrize("decay", [0.0, 1e-4, DECAY, 10.0])
def test_the_gradient_vanishes(cls, decay):
    found, batch = problem(cls)
    before = max(float(g.abs().max()) for g in gradients(found, batch, decay))
    minimum = solve(found, batch, EXACT, decay)
    assert minimum.converged
    assert minimum.attained
    assert before > 1e-2
    for gradient in gradients(found, batch, decay):
        assert float(gradient.abs().max()) < 2e-7
    assert minimum.value == pytest.approx(float(objective(found, batch, decay).detach()), rel=1e-12)


@CLASSES
def test_weights_of_rows_and_the_gradient(cls):
    found, batch = problem(cls)
    weight = torch.linspace(0, 3, N, dtype=torch.float64)
    weighted = Batch(x=batch.x, y=batch.y, weight_y=weight)
    solve(found, weighted, EXACT, DECAY)
    for gradient in gradients(found, weighted, DECAY):
        assert float(gradient.abs().max()) < 2e-7
    assert max(float(gradient.abs().max()) for gradient in gradients(found, batch, DECAY)) > 1e-3


@pytest.mark.parametrize("decay", [1e-4, DECAY])
def test_softmax_is_scikit_learns(decay):
    """C = 1 / (N weight_decay): scikit-learn sums over rows where l_Y is a mean. Standardised, or it would not converge."""
    z = latents()
    z, y = (z - z.mean(0)) / z.std(0), labels(z)
    found = head(Softmax)
    minimum = solve(found, Batch(x=z, y=y), EXACT, decay)
    theirs = LogisticRegression(C=1 / (N * decay), tol=1e-10, max_iter=10_000).fit(z.numpy(), y.numpy())
    np.testing.assert_allclose(found.linear.weight.detach(), theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(found(z).probs.detach(), theirs.predict_proba(z.numpy()), atol=1e-6)
    nll = -theirs.predict_log_proba(z.numpy())[np.arange(N), y.numpy()].mean()
    assert minimum.value == pytest.approx(nll + decay / 2 * (theirs.coef_**2).sum(), abs=1e-9)


def test_unit_variance_is_ridge_regression():
    """1/2N |y' - Z W' - b|^2 + weight_decay/2 |W|^2: scikit-learn's Ridge, in closed form, with alpha = N weight_decay."""
    found, z = head(Gaussian, variance="unit"), latents()
    y = targets(z).nan_to_num(650.0)
    found.prepare(y)
    solve(found, Batch(x=z, y=y), EXACT, DECAY)
    standard = ((y - y.mean(0)) / y.std(0, correction=0)).numpy()
    theirs = Ridge(alpha=N * DECAY, solver="svd").fit(z.numpy(), standard)
    np.testing.assert_allclose(found.linear.weight.detach() * z.std(0), theirs.coef_ * z.std(0).numpy(), atol=1e-7)
    np.testing.assert_allclose(found.linear(z).detach(), theirs.predict(z.numpy()), atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_steps_of_an_optimizer_approach_it(name):
    """The same weight_decay means the same thing to those whose decay is in the gradient; b does not decay."""
    z = latents()
    batch = Batch(x=(z - z.mean(0)) / z.std(0), y=labels(z))
    solved, stepped = head(Softmax), head(Softmax)
    solve(solved, batch, EXACT, DECAY)
    options = Optimizer(name=name, lr={"sgd": 0.5, "adam": 0.01}[name], weight_decay=DECAY)
    optimizer = build_optimizer(options, list(stepped.parameters()))
    for _ in range(3000):
        optimizer.zero_grad()
        supervised(Trace(model=None, batch=batch, p_y=stepped(batch.x))).mean().backward()
        optimizer.step()
    torch.testing.assert_close(stepped.linear.weight, solved.linear.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(stepped(batch.x).probs, solved(batch.x).probs, rtol=0, atol=1e-4)


def test_soft_labels_are_rows_of_every_class():
    """-sum_c soft_c log p_c is what C rows of one class each, with weights C soft_c, give on the average."""
    z, random = latents(), torch.Generator().manual_seed(3)
    soft = torch.softmax(torch.randn(N, C, dtype=torch.float64, generator=random), 1)
    ours, rows = head(Softmax), head(Softmax)
    solve(ours, Batch(x=z, y=soft.argmax(1), soft=soft), EXACT, DECAY)
    classes = torch.arange(C).repeat(N)
    solve(rows, Batch(x=z.repeat_interleave(C, 0), y=classes, weight_y=C * soft.flatten()), EXACT, DECAY)
    torch.testing.assert_close(ours(z).probs, rows(z).probs, rtol=0, atol=1e-7)


def test_a_weight_of_two_is_the_row_twice():
    z = latents()
    y, again = labels(z), torch.arange(0, N, 3)
    weight = torch.ones(N, dtype=torch.float64).index_fill(0, again, 2.0)
    ours, twice = head(Softmax), head(Softmax)
    solve(ours, Batch(x=z, y=y, weight_y=weight), EXACT, DECAY)
    repeated = Batch(x=torch.cat([z, z[again]]), y=torch.cat([y, y[again]]))
    solve(twice, repeated, EXACT, DECAY * N / len(repeated))  # the mean is over more rows
    torch.testing.assert_close(ours(z).probs, twice(z).probs, rtol=0, atol=1e-7)


# --- what must not change it


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e6])
def test_a_constant_latent_gets_no_weight(value, decay):
    z = latents()
    y, more = labels(z), torch.cat([z, torch.full((N, 1), value, dtype=torch.float64)], 1)
    without, ours = head(Softmax), head(Softmax, K + 1)
    solve(without, Batch(x=z, y=y), EXACT, decay)
    assert solve(ours, Batch(x=more, y=y), EXACT, decay).converged
    assert not ours.linear.weight[:, -1].any()
    torch.testing.assert_close(ours(more).probs, without(z).probs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_a_latent_that_is_there_twice(decay):
    """Rank K of K + 1: without decay the same predictions, with it the weight of the one is spread over both."""
    z = latents()
    y, more = labels(z), torch.cat([z, z[:, :1]], 1)
    without, ours = head(Softmax), head(Softmax, K + 1)
    minimum = solve(ours, Batch(x=more, y=y), EXACT, decay)
    assert minimum.converged
    assert minimum.value <= solve(without, Batch(x=z, y=y), EXACT, decay).value + 1e-9
    for gradient in gradients(ours, Batch(x=more, y=y), decay):
        assert float(gradient.abs().max()) < 2e-7
    torch.testing.assert_close(ours.linear.weight[:, 0], ours.linear.weight[:, -1], rtol=1e-3, atol=1e-9)


def test_more_latents_than_rows():
    random = torch.Generator().manual_seed(0)
    z = torch.randn(7, 31, dtype=torch.float64, generator=random)
    batch, found = Batch(x=z, y=torch.arange(7) % C), head(Softmax, 31)
    assert solve(found, batch, EXACT, DECAY).converged
    for gradient in gradients(found, batch, DECAY):
        assert float(gradient.abs().max()) < 2e-7


def test_units_of_the_latents_do_not_matter():
    """Whitening: as many passes, and the same predictions, whatever the units."""
    z = latents()
    y, found = labels(z), []
    for units in (torch.ones(K), 10.0 ** torch.tensor([5, -5, 0, 3, -4])):
        ours = head(Softmax)
        minimum = solve(ours, Batch(x=z * units, y=y), Solver(tolerance=1e-6), 0.0)
        found.append((minimum.passes, ours(z * units).probs))
    assert found[0][0] == found[1][0] < 40
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-8)


def test_whitening_whitens():
    z = latents() - latents().mean(0)
    whiten = solving.whitener(z, DECAY, torch.zeros(K, dtype=torch.bool))
    curvature = z.T @ z / N + 2 * DECAY * torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(whiten @ curvature @ whiten.T, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-4)  # the ridge


def test_parts_add_up(monkeypatch):
    """What is held at once does not matter."""
    whole, parts = head(Softmax), head(Softmax)
    z = latents()
    batch = Batch(x=z, y=labels(z), weight_y=torch.linspace(0, 2, N, dtype=torch.float64))
    solve(whole, batch, EXACT, DECAY)
    monkeypatch.setattr(solving, "PART", 17 * C)
    solve(parts, batch, EXACT, DECAY)
    torch.testing.assert_close(parts.linear.weight, whole.linear.weight, rtol=0, atol=1e-7)


@CLASSES
def test_where_the_head_started_does_not_matter(cls):
    """To the bit: no random number and no weight of before takes part."""
    first, batch = problem(cls)
    second, _ = problem(cls)
    with torch.no_grad():
        second.linear.weight.add_(1.0)
    solve(first, batch, Solver(), DECAY)
    solve(second, batch, Solver(), DECAY)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert torch.equal(first.linear.bias, second.linear.bias)


def test_the_default_tolerance_is_reached_in_float32():
    """And its value is within 1e-3 of the minimum."""
    z = latents()
    batch = Batch(x=z.float(), y=labels(z))
    single, double = head(Softmax).float(), head(Softmax)
    minimum = solve(single, batch, Solver(), 1e-3)
    assert minimum.converged
    best = solve(double, Batch(x=z, y=batch.y), EXACT, 1e-3)
    assert best.value <= minimum.value + 1e-6
    assert minimum.value - best.value < 1e-3


def test_targets_in_float32_do_not_end_the_search_early():
    """A density rounded to float32 tells two points apart by no less than 1e-7 of its value: the last steps would look alike."""
    found, batch = problem(BernoulliHead)
    exact = solve(found, batch, EXACT, DECAY)
    rounded = solve(head(BernoulliHead), Batch(x=batch.x, y=batch.y.float()), EXACT, DECAY)
    assert exact.converged
    assert rounded.converged
    assert rounded.value == pytest.approx(exact.value, rel=1e-9)


# --- what it says


def test_separable_labels_have_no_minimum():
    z = latents()
    y = (z[:, 0] > z[:, 0].median()).long()
    found = head(Softmax)
    assert not solve(found, Batch(x=z, y=y), Solver()).attained
    assert solve(found, Batch(x=z, y=y), Solver(), 1e-3).attained
    assert solve(found, Batch(x=z, y=labels(z)), Solver()).attained


def test_too_few_passes():
    z = latents()
    minimum = solve(head(Softmax), Batch(x=z, y=labels(z)), Solver(max_passes=3))
    assert not minimum.converged
    assert minimum.gradient > 1e-4
    assert minimum.passes <= 3 + 20  # a line search is finished


def test_every_pass_is_told():
    z, told = latents(), []
    batch, found = Batch(x=z, y=labels(z)), head(Softmax)
    minimum = solve(found, batch, Solver(), DECAY, lambda *values: told.append(values))
    assert [passes for passes, *_ in told] == list(range(1, minimum.passes + 1))
    assert told[0][1] == pytest.approx(np.log(C))  # W = 0, b = 0
    assert min(gradient for *_, gradient in told) == minimum.gradient <= 1e-4


def test_latents_that_are_not_finite():
    z = latents()
    z[3, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="stored latents hold values that are not finite"):
        solve(head(Softmax), Batch(x=z, y=labels(latents())), Solver())


# --- the closed forms of heads


@CLASSES
@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_a_head_is_autograds(cls, soft):
    if soft and cls is not Softmax:
        return  # soft labels are of classes
    found, batch = problem(cls)
    random = torch.Generator().manual_seed(5)
    given = torch.rand(N, C, dtype=torch.float64, generator=random) if soft else None  # what they add up to does not matter
    batch = Batch(x=batch.x, y=batch.y, soft=given, weight_y=torch.linspace(0, 2, N, dtype=torch.float64))
    raw = (3 * torch.randn(N, found.linear.out_features, dtype=torch.float64, generator=random)).requires_grad_()
    p_y = found.output(raw)
    (expected,) = torch.autograd.grad(supervised(Trace(model=None, batch=batch, p_y=p_y)).sum(), raw)
    torch.testing.assert_close(found.gradient(found.output(raw.detach()), batch), expected, rtol=1e-10, atol=1e-12)
