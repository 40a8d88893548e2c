"""Virtual adversarial training by closed forms: the Hessian of the divergence, its eigenvectors, and the gradient by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, gradients, part, resolved, rows, trainer_of, weights
from ssl_ae_builtins.vat import Vat, unit
from torch.distributions import Categorical, Independent, Normal

from ssl_ae import Batch, Need, Shapes
from ssl_ae.data.card import Y as Labels
from ssl_ae.errors import RecipeError

X, Y = rows(29, labeled=0.4)
INPUTS, CLASSES = 7, 5


def built(classes=CLASSES, targets=None, **options):
    return part(Vat, options=options).build(Shapes(x=(INPUTS,), latent=5, classes=classes, targets=targets))


def linear_softmax(seed=0):
    """W (C, D), b (C,) and x -> Categorical(logits = W x + b), in float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(CLASSES, INPUTS, generator=generator, dtype=torch.float64)
    b = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    return w, b, lambda x: Categorical(logits=x @ w.mT + b)


def hessians(w, b, x):
    """W' (diag p - p p') W at each row: Fisher information of softmax, the Hessian of KL(p(x) || p(x + r)) at r = 0."""
    p = np.exp((x @ w.mT + b).log_softmax(1).numpy())
    fisher = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("ci,ncd,dj->nij", w.numpy(), fisher, w.numpy())


SAMPLES = torch.randn(11, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# --- the direction


def test_one_iteration_is_the_hessian_applied_to_the_random_direction():
    w, b, predict = linear_softmax()
    torch.manual_seed(5)
    r = built(xi=1e-6, eps=3.0).adversary(predict(SAMPLES), predict, SAMPLES)
    torch.manual_seed(5)
    start = torch.randn_like(SAMPLES).numpy()
    turned = np.einsum("nij,nj->ni", hessians(w, b, SAMPLES), start / np.linalg.norm(start, axis=1, keepdims=True))
    np.testing.assert_allclose(r, 3.0 * turned / np.linalg.norm(turned, axis=1, keepdims=True), rtol=0, atol=1e-5)


def test_the_gradient_at_a_finite_distance():
    """Of KL(p(x) || p(x + r)) at r = xi d, by hand: W' (q - p)."""
    w, _, predict = linear_softmax()
    torch.manual_seed(5)
    r = built(xi=0.8, eps=1.0).adversary(predict(SAMPLES), predict, SAMPLES)
    torch.manual_seed(5)
    start = torch.randn_like(SAMPLES)
    away = predict(SAMPLES + 0.8 * start / start.norm(dim=1, keepdim=True)).probs
    expected = (away - predict(SAMPLES).probs) @ w
    torch.testing.assert_close(r, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)


def test_power_iteration_ends_at_the_dominant_eigenvector():
    """numpy's eigh of the closed form. The error falls by the ratio of the two largest eigenvalues, at most 0.86 here, a time."""
    w, b, predict = linear_softmax()
    values, vectors = np.linalg.eigh(hessians(w, b, SAMPLES))
    assert (values[:, -2] / values[:, -1]).max() < 0.9
    found = built(xi=1e-6, iterations=150).adversary(predict(SAMPLES), predict, SAMPLES).numpy()
    np.testing.assert_allclose(np.abs((found * vectors[:, :, -1]).sum(1)), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-2, 2e-2])
def test_the_value_is_half_the_quadratic_form_of_the_hessian(eps):
    """KL(p(x) || p(x + r)) = r' H r / 2 + O(|r|^3); along the dominant eigenvector, eps^2 times half its eigenvalue."""
    w, b, predict = linear_softmax()
    trace = SimpleNamespace(batch=SimpleNamespace(x=SAMPLES), predict=predict)
    value = built(xi=1e-6, eps=eps, iterations=150).penalty(trace)
    largest = np.linalg.eigvalsh(hessians(w, b, SAMPLES))[:, -1]
    np.testing.assert_allclose(value, eps**2 * largest / 2, rtol=3 * eps)


@pytest.mark.parametrize("shape", [(7,), (2, 13), (3, 7, 5)])
def test_every_row_s_disturbance_has_norm_eps(shape):
    model = fresh(resolved(shape))
    x = torch.randn(5, *shape, dtype=torch.float64)
    r = part(Vat, options={"eps": 2.5}).build(Shapes(x=shape, latent=5, classes=3)).adversary(model.predict(x), model.predict, x)
    assert r.shape == x.shape
    np.testing.assert_allclose(r.flatten(1).norm(dim=1), 2.5, rtol=1e-12)


def test_directions_of_tiny_gradients_and_of_none():
    """1e-30 squared is 0 in float32. Where nothing changes, there is no direction and no penalty."""
    d = torch.tensor([[3e-30, -4e-30], [0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(unit(d), torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.6, 0.8]]))
    logits = torch.zeros(11, CLASSES, requires_grad=True)
    flat = SimpleNamespace(
        batch=SimpleNamespace(x=SAMPLES.float()), predict=lambda x: Categorical(logits=logits + 0 * x[:, :CLASSES])
    )
    assert torch.equal(built().penalty(flat), torch.zeros(11))


# --- the gradient


def test_no_gradient_passes_through_the_prediction_or_the_direction():
    """d KL / d W = sum (q - p)(x + r)' with p and r constant, by hand."""
    w, _, predict = linear_softmax()
    w.requires_grad_()
    term, trace = built(eps=0.7), SimpleNamespace(batch=SimpleNamespace(x=SAMPLES), predict=predict)
    torch.manual_seed(7)
    term.penalty(trace).sum().backward()
    torch.manual_seed(7)
    with torch.no_grad():
        p = predict(SAMPLES)
        moved = SAMPLES + term.adversary(p, predict, SAMPLES).detach()
        expected = (predict(moved).probs - p.probs).mT @ moved
    torch.testing.assert_close(w.grad, expected, rtol=1e-10, atol=1e-12)


def test_of_a_regression_it_is_the_squared_change_in_standard_deviations():
    """KL(N(m, s^2) || N(m', s^2)) = (m - m')^2 / 2 s^2, so H = W' W / s^2: numpy's largest singular value, squared."""
    w = torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predict = lambda x: Independent(Normal(x @ w.mT, torch.tensor([0.5], dtype=torch.float64)), 1)  # noqa: E731
    term = built(classes=None, targets=2, eps=3.0, iterations=100)
    value = term.penalty(SimpleNamespace(batch=SimpleNamespace(x=SAMPLES), predict=predict))
    np.testing.assert_allclose(value, 9.0 * np.linalg.svd(w.numpy())[1][0] ** 2 / (2 * 0.25), rtol=1e-9)


# --- in the engine


def found_of(**more):
    encoder = {"name": "mlp", "widths": [11], "activation": "tanh", "batch_norm": True}
    noise = {"name": "gaussian_noise", "scale": 5.0}
    return resolved(model={"encoder": encoder, "regularizers": [noise, {"name": "vat", **more}]})


def test_the_row_is_undisturbed_and_statistics_stay():
    """By the formula from the model in evaluation, whatever noise the pass has; running averages stay."""
    model, x = fresh(found_of()), torch.from_numpy(X)
    trace = model(Batch(x=x), frozenset({Need.PREDICTION}))
    before = weights(model)
    torch.manual_seed(11)
    value = model.regularizers[1].penalty(trace)
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())
    model.eval()
    torch.manual_seed(11)
    r = model.regularizers[1].adversary(model.head(model.features(x)), lambda x: model.head(model.features(x)), x)
    p, q = (model.head(model.features(at)) for at in (x, x + r))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # as in validation
        torch.manual_seed(11)
        torch.testing.assert_close(model.regularizers[1].penalty(trace), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["joint", "alternate", "end-to-end"])
def test_unlabelled_rows_count_like_the_others(mode):
    trainer = trainer_of(found_of(), mode, feed_of(X, Y))
    run = trainer.runs[-1]
    assert run.phase.draw.uniform > 0
    unlabelled = torch.from_numpy(Y < 0)
    trainer.make_step(run, [Batch(x=torch.from_numpy(X)[unlabelled])])
    assert gradients(trainer.model)["head.linear.weight"].abs().max() > 0
    assert float(run.shares[run.terms.index("vat")]) > 0
    trainer.run()


def test_it_is_computed_in_float32_under_autocast():
    model, x = fresh(found_of(), dtype=torch.float32).eval(), torch.from_numpy(X).float()
    term, predict = model.regularizers[1], lambda x: model.head(model.features(x))
    torch.manual_seed(3)
    expected = torch.distributions.kl_divergence(predict(x), predict(x + term.adversary(predict(x), predict, x)))
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term.penalty(model(Batch(x=x), frozenset({Need.PREDICTION})))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_refused():
    coding = {"encoder": {"name": "sparse_coding", "sparsity": 0.1}, "decoder": {"name": "linear"}}
    codes = [{"name": "sparse_l1", "weight": 0.1}, {"name": "unit_norm"}]
    with pytest.raises(RecipeError, match=r"its code carries no gradient to the sample, where vat searches"):
        resolved(model={**coding, "regularizers": [*codes, {"name": "vat"}]})
    with pytest.raises(RecipeError, match=r"eps = 0\.0: expected greater than 0"):
        resolved(model={"regularizers": [{"name": "vat", "eps": 0.0}]})
    resolved(
        y=Labels(task="regression", names=("u", "v")), model={"head": {"name": "gaussian"}, "regularizers": [{"name": "vat"}]}
    )
