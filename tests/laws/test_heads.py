"""Heads against hand-made formulas, scipy's densities and scikit-learn's own pipelines."""

import numpy as np
import pytest
import torch
from engine_kit import resolved
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from ssl_ae_builtins.heads import BernoulliHead, Gaussian, Mlp, Softmax
from ssl_ae_builtins.label_spreading import LabelSpreading
from ssl_ae_builtins.table_heads import Knn, Logistic

from ssl_ae import Batch, Shapes
from ssl_ae.errors import RecipeError
from ssl_ae.objective import supervised
from ssl_ae.trace import Trace

B, K, C, T = 13, 5, 3, 2


def latents(count=B, seed=0, dtype=torch.float32):
    return torch.randn(count, K, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def head(cls, classes=C, targets=None, **options):
    torch.manual_seed(0)
    return cls(cls.Config(**options), Shapes((7,), K, classes, targets))


def supervision(found, z, y, weight=None):
    """l_Y of each row by the engine's own term."""
    return supervised(Trace(model=None, batch=Batch(x=z, y=y, weight_y=weight), p_y=found(z))).detach().numpy()


# --- differentiable heads


def test_softmax_by_hand():
    found, z = head(Softmax).double(), latents(dtype=torch.float64)
    logits = (z @ found.linear.weight.T + found.linear.bias).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found(z).probs.detach(), p, rtol=1e-12)
    y = torch.arange(B) % C
    np.testing.assert_allclose(supervision(found, z, y), -np.log(p[np.arange(B), y]), rtol=1e-12)


def test_weights_and_soft_labels():
    found, z = head(Softmax).double(), latents(dtype=torch.float64)
    log_p = found(z).probs.log().detach().numpy()
    y, weight = torch.arange(B) % C, torch.linspace(0, 2, B, dtype=torch.float64)
    np.testing.assert_allclose(supervision(found, z, y, weight), -weight.numpy() * log_p[np.arange(B), y], atol=1e-12)
    soft = torch.softmax(torch.randn(B, C, dtype=torch.float64), 1)
    value = supervised(Trace(model=None, batch=Batch(x=z, y=y, soft=soft), p_y=found(z))).detach().numpy()
    np.testing.assert_allclose(value, -(soft.numpy() * log_p).sum(1), rtol=1e-12)


def test_mlp_by_hand():
    found, z = head(Mlp, widths=(11,), activation="tanh").double(), latents(dtype=torch.float64)
    first, last = found.layers[0], found.layers[2]
    logits = torch.tanh(z @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(found(z).probs, logits.softmax(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cls", [Gaussian, Mlp])
def test_regression_speaks_the_users_units(cls):
    """Targets of mean 700 and sd 40: p(y|z) is N(mean + sd raw, (sd s)^2), with the labels' mean and sd by numpy."""
    y = torch.tensor([700.0, -3.0], dtype=torch.float64) + torch.tensor([40.0, 0.1]) * torch.randn(B, T, dtype=torch.float64)
    y[2, 0] = y[5, 1] = torch.nan
    z = latents(dtype=torch.float64)
    found = head(cls, classes=None, targets=T).double()
    found.prepare(y)
    mean, std = np.nanmean(y.numpy(), 0), np.nanstd(y.numpy(), 0)
    raw = (found.linear if cls is Gaussian else found.layers)(z).detach().numpy()
    s = np.log1p(np.exp(found.units.raw_std.detach().numpy())) + 1e-3
    p = found(z)
    np.testing.assert_allclose(p.mean.detach(), mean + std * raw, rtol=1e-10)
    expected = stats.norm.logpdf(y.numpy(), mean + std * raw, std * s)
    np.testing.assert_allclose(supervision(found, z, y), -np.nansum(expected, 1), rtol=1e-10)
    np.testing.assert_allclose(s, 1.0, atol=2e-3)  # the noise starts at one standard deviation of the targets


def regression_targets():
    """(B, T) that depend on the latents, with noise, in units of their own."""
    z = latents(dtype=torch.float64)
    slope = torch.tensor([[30.0, -0.1]] * K, dtype=torch.float64)
    return z @ slope + torch.tensor([700.0, -3.0]) + torch.randn(B, T, dtype=torch.float64) * torch.tensor([40.0, 0.1])


def test_unit_variance_is_least_squares_in_standard_deviations():
    """-log p(y|z) = 1/2 |y' - W z - b|^2 + sum log sd + T/2 log 2 pi, y' = (y - mean) / sd of the labels by numpy."""
    y, z = regression_targets(), latents(dtype=torch.float64)
    y[2, 0] = torch.nan
    found = head(Gaussian, classes=None, targets=T, variance="unit").double()
    found.prepare(y)
    assert {name for name, _ in found.named_parameters()} == {"linear.weight", "linear.bias"}  # no noise to learn
    sd = np.nanstd(y.numpy(), 0)
    standard = (y.numpy() - np.nanmean(y.numpy(), 0)) / sd
    each = 0.5 * (standard - found.linear(z).detach().numpy()) ** 2 + np.log(sd) + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(supervision(found, z, y), np.nansum(each, 1), rtol=1e-10)
    np.testing.assert_allclose(found(z).stddev.detach(), np.broadcast_to(sd, (B, T)), rtol=1e-12)


def test_the_gradient_of_unit_variance_is_the_lms_rule():
    """dl/dW = -sum_n (y'_n - W z_n - b) z_n' (Widrow & Hoff 1960), and zero at numpy's least-squares solution."""
    y, z = regression_targets(), latents(dtype=torch.float64)
    found = head(Gaussian, classes=None, targets=T, variance="unit").double()
    found.prepare(y)
    standard = ((y - y.mean(0)) / y.std(0, correction=0)).numpy()

    def gradient():
        found.zero_grad()
        supervised(Trace(model=None, batch=Batch(x=z, y=y), p_y=found(z))).sum().backward()
        return found.linear.weight.grad.numpy(), found.linear.bias.grad.numpy()

    residual = standard - found.linear(z).detach().numpy()
    weight, bias = gradient()
    np.testing.assert_allclose(weight, -residual.T @ z.numpy(), rtol=1e-9)
    np.testing.assert_allclose(bias, -residual.sum(0), rtol=1e-9)
    solution = np.linalg.lstsq(np.column_stack([z.numpy(), np.ones(B)]), standard, rcond=None)[0]
    with torch.no_grad():
        found.linear.weight.copy_(torch.from_numpy(solution[:K].T))
        found.linear.bias.copy_(torch.from_numpy(solution[K]))
    for value in gradient():
        np.testing.assert_allclose(value, 0, atol=1e-10)


def test_learned_variance_is_best_at_the_residuals_mean_square():
    """With W and b fixed, l_Y is least where s^2 is the mean squared residual: its gradient in s vanishes there alone."""
    y, z = regression_targets(), latents(dtype=torch.float64)
    found = head(Gaussian, classes=None, targets=T).double()
    found.prepare(y)
    standard = (y - y.mean(0)) / y.std(0, correction=0)
    rms = (standard - found.linear(z)).detach().square().mean(0).sqrt()
    for factor, sign in ((0.5, -1), (1.0, 0), (2.0, 1)):
        with torch.no_grad():
            found.units.raw_std.copy_(torch.log(torch.expm1(factor * rms - 1e-3)))  # softplus(r) + 1e-3 = factor * rms
        (gradient,) = torch.autograd.grad(-found(z).log_prob(y).sum(), [found.units.raw_std])
        assert torch.equal(torch.where(gradient.abs() < 1e-9, 0, gradient).sign(), torch.full((T,), sign, dtype=torch.float64))


def test_softmax_without_weights_reads_the_code_as_logits():
    z = torch.randn(B, C, dtype=torch.float64)
    found = Softmax(Softmax.Config(weights=False), Shapes((7,), C, C))
    assert list(found.parameters()) == []
    y = torch.arange(B) % C
    expected = torch.nn.functional.cross_entropy(z, y, reduction="none")
    np.testing.assert_allclose(supervision(found, z, y), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("latent", "mode", "complaint"),
    [
        (5, "joint", r"latent_dim must be the 3 classes, but it is 5\. Set model\.latent_dim: 3, or weights: true"),
        (
            3,
            "sequential",
            r"this one has nothing to learn\. Set finetune\.mode: joint, alternate or end-to-end, or weights: true",
        ),
    ],
)
def test_softmax_without_weights_is_refused_where_it_cannot_learn(latent, mode, complaint):
    bare = {"head": {"name": "softmax", "weights": False}}
    with pytest.raises(RecipeError, match=complaint):
        resolved(model=bare | {"latent_dim": latent}, finetune={"mode": mode})
    for other in ("joint", "alternate", "end-to-end"):
        assert resolved(model=bare | {"latent_dim": 3}, finetune={"mode": other}).head.config.weights is False


def test_constant_and_unknown_targets_keep_unit_scale():
    found = head(Gaussian, classes=None, targets=T)
    found.prepare(torch.tensor([[4.0, torch.nan], [4.0, torch.nan]]))
    assert found.units.mean.tolist() == [4.0, 0.0]
    assert found.units.std.tolist() == [1.0, 1.0]


def test_bernoulli_is_scipys_for_each_target():
    found, z = head(BernoulliHead, classes=None, targets=T).double(), latents(dtype=torch.float64)
    y = (latents(seed=2, dtype=torch.float64)[:, :T] > 0).double()
    y[3, 1] = torch.nan
    q = 1 / (1 + np.exp(-found.linear(z).detach().numpy()))
    expected = np.where(np.isnan(y.numpy()), 0.0, stats.bernoulli.logpmf(np.nan_to_num(y.numpy()), q))
    np.testing.assert_allclose(supervision(found, z, y), -expected.sum(1), rtol=1e-10)


@pytest.mark.parametrize(("cls", "targets"), [(Softmax, None), (Mlp, None), (Mlp, T), (Gaussian, T), (BernoulliHead, T)])
def test_unlabelled_rows_have_finite_values_and_gradients(cls, targets):
    found = head(cls, classes=None if targets else C, targets=targets)
    z = latents().requires_grad_()
    y = torch.full((B, targets), torch.nan) if targets else torch.full((B,), -1)
    value = supervised(Trace(model=None, batch=Batch(x=z.detach(), y=y), p_y=found(z)))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("cls", "targets"), [(Softmax, None), (Mlp, None), (Mlp, T), (Gaussian, T), (BernoulliHead, T)])
def test_state_of_a_head_survives_a_round_trip(cls, targets):
    found = head(cls, classes=None if targets else C, targets=targets)
    if targets:
        found.prepare(torch.randn(B, targets) * 3 + 2)
    again = head(cls, classes=None if targets else C, targets=targets)
    again.load_state_dict(found.state_dict())
    z = latents()
    assert torch.equal(again(z).mean if targets else again(z).probs, found(z).mean if targets else found(z).probs)


# --- table heads


def clusters(classes, count=83, seed=0):
    """Overlapping clusters in units that differ by feature, so that standardising matters."""
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=count)
    z = (random.normal(size=(count, K)) + 0.7 * y[:, None]) * 10.0 ** np.arange(-2, 3) + np.arange(K)
    return z.astype(np.float32), y


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [0.1, 1.0])
def test_logistic_is_scikit_learns_pipeline(classes, C):
    z, y = clusters(classes)
    partly = y.copy()
    partly[::4] = -1
    found = head(Logistic, classes, C=C)
    found.fit(torch.from_numpy(z), torch.from_numpy(partly))
    known = partly >= 0
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000, tol=1e-8)).fit(z[known], y[known])
    np.testing.assert_allclose(found(torch.from_numpy(z)).probs, pipeline.predict_proba(z), atol=2e-3)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_logistic_gives_a_class_without_labels_no_probability(missing):
    z, y = clusters(3)
    known = y != missing
    found = head(Logistic, 3)
    found.fit(torch.from_numpy(z), torch.from_numpy(np.where(known, y, -1)))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(z[known], y[known])
    p = found(torch.from_numpy(z)).probs
    assert not p[:, missing].any()
    np.testing.assert_allclose(p[:, [c for c in range(3) if c != missing]], pipeline.predict_proba(z), atol=2e-3)


def test_logistic_of_a_single_class_is_sure_of_it():
    z, _ = clusters(3)
    found = head(Logistic, 3)
    found.fit(torch.from_numpy(z), torch.full((len(z),), 1))
    assert torch.equal(found(torch.from_numpy(z)).probs, torch.eye(3)[torch.ones(len(z), dtype=torch.long)])


DISTANCES = {
    "euclidean": lambda a, b: np.sqrt(((a - b) ** 2).sum(-1)),
    "manhattan": lambda a, b: np.abs(a - b).sum(-1),
    "cosine": lambda a, b: 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1),
}


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_knn_votes_by_brute_force(metric, k):
    z, y = clusters(3)
    y[::5] = -1
    asked = latents(17, seed=4).numpy()
    found = head(Knn, 3, k=k, metric=metric)
    found.fit(torch.from_numpy(z), torch.from_numpy(y))
    known, few = y >= 0, min(k, int((y >= 0).sum()))
    distances = DISTANCES[metric](asked[:, None].astype(np.float64), z[known][None].astype(np.float64))
    nearest = y[known][np.argsort(distances, axis=1)[:, :few]]
    votes = np.stack([(nearest == c).sum(1) for c in range(3)], 1)
    np.testing.assert_allclose(found(torch.from_numpy(asked)).probs, (votes + 1 / 3) / (few + 1), rtol=1e-6)


@pytest.mark.parametrize("cls", [Logistic, Knn, LabelSpreading])
def test_a_fitted_table_head_is_its_buffers(cls):
    """A fresh head takes the state of a fitted one, and so does one fitted to other rows."""
    z, y = clusters(3)
    found, fresh, other = head(cls), head(cls), head(cls)
    found.fit(torch.from_numpy(z), torch.from_numpy(y))
    other.fit(torch.from_numpy(z[:31] + 5), torch.from_numpy(y[:31]))
    other(torch.from_numpy(z))
    for again in (fresh, other):
        again.load_state_dict(found.state_dict())
        assert torch.equal(again(torch.from_numpy(z)).probs, found(torch.from_numpy(z)).probs)


@pytest.mark.parametrize("cls", [Logistic, Knn, LabelSpreading])
def test_rows_are_predicted_one_by_one(cls):
    z, y = clusters(3)
    found = head(cls)
    found.fit(torch.from_numpy(z), torch.from_numpy(y))
    together = found(torch.from_numpy(z[:7])).probs
    alone = torch.cat([found(torch.from_numpy(z[i : i + 1])).probs for i in range(7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
