"""|dE[z|x]/dx|_F^2 in value and gradient against vmap(jacrev) of the whole map, for every form that computes it."""

import pytest
import torch
from engine_kit import fresh, gradients, resolved, rows
from ssl_ae_builtins import jacobians
from ssl_ae_builtins.activations import activation
from ssl_ae_builtins.noise import GaussianNoise
from torch.func import jacrev, vmap

from ssl_ae import Batch, Need
from ssl_ae.errors import RecipeError
from ssl_ae.model import frozen

RELATIVE = 1e-6  # of the issue; float64 reaches 1e-12
B = 13
CHECKPOINT = jacobians.checkpoint


def built(encoder, shape=(7,), latent=5, regularizers=(), extra=()):
    """A model with the penalty first, in float64, and B rows."""
    model = {
        "latent_dim": latent,
        "encoder": encoder,
        "decoder": {"name": "linear"},
        "regularizers": [{"name": "contractive"}, *regularizers],
    }
    found = fresh(resolved(shape=shape, model=model, extra=extra), head=False)
    return found, Batch(x=torch.from_numpy(rows(B, shape)[0]))


def reference(model, x):
    """(B,) by torch.func, of the map that extraction uses."""
    with frozen(model):
        jacobian = vmap(jacrev(lambda row: model.posterior(row[None]).mean[0]))(x)
    return jacobian.flatten(1).square().sum(1)


def compare(model, batch, value):
    """Value and the gradient of a weighted sum of rows, so that no row hides behind another."""
    model.zero_grad()
    expected = reference(model, batch.x)
    torch.testing.assert_close(value, expected, rtol=RELATIVE, atol=0)
    weight = torch.linspace(0.5, 2.0, len(batch), dtype=torch.float64)
    (expected * weight).sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    (value * weight).sum().backward()
    found = gradients(model)
    assert any(bool(g.any()) for g in wanted.values())
    for name, p in model.named_parameters():
        nothing = torch.zeros_like(p)
        one, other = found.get(name, nothing), wanted.get(name, nothing)
        torch.testing.assert_close(one, other, rtol=RELATIVE, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def mlp(*widths, **options):
    return {"name": "mlp", "widths": list(widths), **options}


CLOSED = [
    {"name": "linear"},
    {"name": "linear", "posterior": "diag"},
    mlp(),
    mlp(code_activation="sigmoid"),
    *(mlp(11, activation=act) for act in ("sigmoid", "tanh", "relu", "identity")),
    mlp(11, activation="tanh", posterior="diag"),
    mlp(11, activation="tanh", posterior="full"),
    mlp(11, activation="relu", code_activation="sigmoid"),
    mlp(11, activation="sigmoid", code_activation="tanh"),
    mlp(11, activation="identity", code_activation="tanh"),
    mlp(3, activation="tanh", code_activation="sigmoid"),
]
OPEN = [
    mlp(11, 6, activation="tanh"),
    mlp(11, activation="gelu"),
    mlp(11, activation="tanh", code_activation="silu"),
    mlp(11, activation="tanh", batch_norm=True),
]


def name_of(encoder):
    return "-".join(str(value) for value in encoder.values())


@pytest.mark.parametrize("encoder", CLOSED, ids=name_of)
def test_closed_forms(encoder):
    model, batch = built(encoder)
    trace = model(batch, frozenset({Need.CLEAN}))
    assert model.encoder.squared_jacobian(trace.clean) is not None
    compare(model, batch, model.regularizers[0].penalty(trace))


@pytest.mark.parametrize("encoder", OPEN, ids=name_of)
def test_by_autograd(encoder):
    """With batch normalisation: by the running statistics, in training too, because rows must not know each other."""
    model, batch = built(encoder)
    with torch.no_grad():
        model.train()(batch)  # running statistics that are no zeros and ones
    trace = model(batch, frozenset({Need.CLEAN}))
    assert model.encoder.squared_jacobian(trace.clean) is None
    compare(model, batch, model.regularizers[0].penalty(trace))


def test_of_a_convolution():
    model, batch = built({"name": "conv", "channels": [3], "activation": "tanh"}, shape=(2, 5, 3))
    compare(model, batch, model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN}))))


def test_images_count_every_pixel():
    model, batch = built(mlp(11, activation="tanh"), shape=(2, 5, 3))
    compare(model, batch, model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN}))))


# --- activations and orders of evaluation


@pytest.mark.parametrize("name", jacobians.SLOPES)
def test_slopes_from_outputs(name):
    """f'(s) by autograd at points on both sides of every kink, and at the kinks themselves."""
    s = torch.tensor([-3.0, -1.0, -0.4, 0.0, 0.3, 1.0, 2.5, 30.0], dtype=torch.float64, requires_grad=True)
    out = activation(name)(s)
    (expected,) = torch.autograd.grad(out.sum(), s)
    torch.testing.assert_close(jacobians.SLOPES[name](out), expected, rtol=1e-6, atol=1e-7)


# (B, D, H, K): the Gram form; units through W1, because H > D; units through W1 W1', because H < D
ORDERS = {"gram": (101, 7, 5, 3), "units-direct": (2, 3, 101, 2), "units-gram": (13, 97, 11, 5)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("code", ["identity", "sigmoid"])
def test_every_order_of_evaluation_is_the_same_number(order, code):
    torch.manual_seed(0)
    b, d, h, k = ORDERS[order]
    x = torch.randn(b, d, dtype=torch.float64)
    w1, w2 = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((h, d), (k, h)))
    hidden = torch.tanh(x @ w1.T / d**0.5)
    out = activation(code)(hidden @ w2.T / h**0.5)
    # the maps' own weights: W1 / sqrt(D) and W2 / sqrt(H)
    value = jacobians.of_chain([(w1 / d**0.5, "tanh", hidden), (w2 / h**0.5, code, out)])
    jacobian = vmap(jacrev(lambda row: activation(code)(torch.tanh(w1 @ row / d**0.5) @ w2.T / h**0.5)))(x)
    expected = jacobian.square().sum((1, 2))
    torch.testing.assert_close(value, expected, rtol=RELATIVE, atol=0)
    for one, other in zip(
        torch.autograd.grad(value.square().sum(), (w1, w2)), torch.autograd.grad(expected.square().sum(), (w1, w2)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=RELATIVE, atol=1e-10)


def test_in_bf16_it_is_the_same_to_the_rounding():
    """Three digits of the sums of some hundred products, and gradients as wide as the parameters, which stay in float32."""
    model, batch = built(mlp(61, activation="sigmoid"), shape=(67,))
    model, batch = model.float(), Batch(x=batch.x.float())
    found = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            value = model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN})))
        value.float().sum().backward()
        found.append([value.float(), *gradients(model).values()])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.02 * one.norm()


@pytest.mark.parametrize(
    "encoder", [mlp(11, 6, activation="tanh"), mlp(11, activation="tanh", code_activation="sigmoid")], ids=name_of
)
def test_rows_in_parts_are_the_same(encoder, monkeypatch):
    """What is computed again instead of kept must be the same to the bit of the order of summation."""
    model, batch = built(encoder)
    seen = []
    monkeypatch.setattr(
        jacobians, "checkpoint", lambda of, *given, **how: seen.append(len(given[0])) or CHECKPOINT(of, *given, **how)
    )
    monkeypatch.setattr(jacobians, "MOST_NUMBERS", 400)
    value = model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN})))
    assert len(seen) > 1
    assert sum(seen) == B
    compare(model, batch, value)


# --- what it is of


def test_it_is_no_penalty_of_the_weights():
    """sum_k (z_k (1 - z_k))^2 |w_k|^2 (Rifai et al. 2011): the logistic's slope is at most 1/4, less where units saturate."""
    model, batch = built(mlp(code_activation="sigmoid"))
    weight = model.encoder.latent.linear.weight.detach()
    value = model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN}))).detach()
    z = torch.sigmoid(batch.x @ weight.T + model.encoder.latent.linear.bias.detach())
    torch.testing.assert_close(value, (z * (1 - z)).square() @ weight.square().sum(1), rtol=1e-12, atol=0)
    assert float(value.std()) > 0.01 * float(value.mean())
    assert bool((value < weight.square().sum() / 16).all())


@pytest.mark.parametrize("encoder", [mlp(11, activation="tanh"), mlp(11, 6, activation="tanh")], ids=name_of)
def test_beside_noise_it_is_of_the_clean_map(encoder):
    noises = [{"name": "gaussian_noise", "scale": 0.7}, {"name": "dropout", "rate": 0.5}, {"name": "masking_noise"}]
    model, batch = built(encoder, regularizers=noises)
    quiet, _ = built(encoder)
    trace = model.train()(batch, frozenset({Need.CLEAN}))
    assert not torch.equal(trace.taps["h1"], trace.clean["h1"])
    value = model.regularizers[0].penalty(trace)
    torch.testing.assert_close(value, quiet.regularizers[0].penalty(quiet(batch, frozenset({Need.CLEAN}))), rtol=0, atol=0)
    compare(model, batch, value)


def test_what_always_changes_the_input_is_part_of_the_map():
    """E[z] = V (x / 2) + b has the Jacobian V / 2."""

    class Halved(GaussianNoise):
        name, always = "halved", True

        def perturb(self, h, layer):
            return h / 2

    model, batch = built({"name": "linear"}, extra=[(Halved,)])
    value = model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN})))
    expected = model.encoder.latent.linear.weight.square().sum() / 4
    torch.testing.assert_close(value, expected.expand(B), rtol=1e-12, atol=0)
    compare(model, batch, value)


@pytest.mark.parametrize("encoder", [mlp(11, activation="tanh"), mlp(11, 6, activation="tanh")], ids=name_of)
def test_it_is_measured_where_nothing_is_learnt(encoder):
    model, batch = built(encoder)
    expected = reference(model, batch.x).detach()
    with frozen(model), torch.no_grad():
        value = model.regularizers[0].penalty(model(batch, frozenset({Need.CLEAN})))
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=RELATIVE, atol=0)


def test_a_search_has_no_jacobian():
    with pytest.raises(RecipeError, match=r"contractive needs dE\[z\|x\]/dx, but encoder builtins/sparse_coding finds its code"):
        built({"name": "sparse_coding"})


def test_the_picture_shows_singular_values():
    model, batch = built(mlp(11, activation="tanh"))
    with frozen(model), torch.no_grad():
        (picture,) = model.regularizers[0].pictures(model(batch))
        (shown,) = picture.lines.values()
        jacobian = vmap(jacrev(lambda row: model.posterior(row[None]).mean[0]))(batch.x)
    expected = torch.stack([torch.linalg.svdvals(j) for j in jacobian]).mean(0)
    torch.testing.assert_close(shown.double(), expected, rtol=1e-5, atol=1e-6)
    assert shown.shape == (5,)
