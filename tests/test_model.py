"""Components at work: shapes of every built-in encoder and decoder, taps, seeds, and what a model refuses."""

import itertools

import pytest
import torch
from engine_kit import assert_same, feed_of, fresh, part, resolved, rows, trainer_of, weights
from ssl_ae_builtins.activations import activation

import ssl_ae
from ssl_ae import Batch, Need
from ssl_ae.data.card import Y
from ssl_ae.errors import RecipeError
from ssl_ae.model import frozen, on_codes
from ssl_ae.trace import Pass

BOTH = frozenset({Need.RECONSTRUCTION, Need.PREDICTION})
B, K = 11, 5

NETWORKS = {
    "linear": {"encoder": {"name": "linear"}, "decoder": {"name": "linear"}},
    "mlp": {"encoder": {"name": "mlp", "widths": [13, 7]}, "decoder": {"name": "mlp"}},
    "mlp without layers": {"encoder": {"name": "mlp", "widths": []}, "decoder": {"name": "mlp"}},
    "conv": {"encoder": {"name": "conv", "channels": [3, 2]}, "decoder": {"name": "conv"}},
    "conv, deep and wide": {
        "encoder": {"name": "conv", "channels": [3, 2, 5], "kernel": 5, "batch_norm": True},
        "decoder": {"name": "conv"},
    },
    "conv to mlp": {"encoder": {"name": "conv", "channels": [3]}, "decoder": {"name": "mlp", "widths": [7]}},
    "mlp to conv": {"encoder": {"name": "mlp", "widths": [7]}, "decoder": {"name": "conv", "channels": [3]}},
}
SHAPES = [(7,), (2, 13), (1, 11, 5), (3, 8, 17)]


def batch_of(shape):
    x, y = rows(B, shape)
    return Batch(x=torch.from_numpy(x).sigmoid(), y=torch.from_numpy(y))


def fits(network, shape):
    return "conv" not in network or len(shape) > 1


EVERY = pytest.mark.parametrize(("network", "shape"), [p for p in itertools.product(NETWORKS, SHAPES) if fits(*p)])


@EVERY
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
@pytest.mark.parametrize("posterior", ["point", "diag", "full"])
def test_every_network_gives_distributions_of_the_right_shape(network, shape, likelihood, posterior):
    tree = NETWORKS[network]
    decoder = {**tree["decoder"], "likelihood": likelihood, **({"levels": 3} if likelihood == "categorical" else {})}
    model = fresh(resolved(shape, model={"encoder": {**tree["encoder"], "posterior": posterior}, "decoder": decoder}))
    trace = model(batch_of(shape), BOTH)
    assert (trace.q.batch_shape, trace.q.event_shape) == ((B,), (K,))
    assert trace.draws.shape == (1, B, K)
    assert (trace.p_x.batch_shape, trace.p_x.event_shape) == ((B,), shape)
    assert trace.p_x.mean.shape == (B, *shape)
    assert trace.p_x.log_prob(batch_of(shape).x).shape == (B,)
    assert trace.p_y.batch_shape == (B,)
    assert model.features(batch_of(shape).x).shape == (B, K)


@EVERY
def test_rows_do_not_meet(network, shape):
    """Each row's features and reconstruction are its own, in evaluation: batch-norm included."""
    model = fresh(resolved(shape, model=NETWORKS[network])).eval()
    x = batch_of(shape).x
    together = model.features(x)
    alone = torch.cat([model.features(row[None]) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-12)
    rebuilt = torch.cat([model.decode(z[None]).mean for z in together])
    torch.testing.assert_close(rebuilt, model.decode(together).mean, rtol=1e-10, atol=1e-12)


@EVERY
def test_every_parameter_has_a_gradient(network, shape):
    found = resolved(shape, model=NETWORKS[network])
    trainer = trainer_of(found, "joint", feed_of(*rows(B, shape)))
    trainer.make_step(trainer.runs[0], [batch_of(shape)])
    assert [name for name, p in trainer.model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("name", ["gaussian", "mlp"])
def test_regression_trains_in_every_mode(name):
    x, _ = rows(23)
    y = torch.randn(23, 2, dtype=torch.float64)
    y[3], y[5, 1] = torch.nan, torch.nan
    found = resolved(y=Y(task="regression", names=("a", "b")), model={"head": {"name": name}})
    for mode in ("joint", "alternate", "end-to-end"):
        model = fresh(found)
        model.head.prepare(y)
        trainer_of(found, mode, feed_of(x, y.numpy()), model).run()
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_decoder_mirrors_its_encoder():
    mlp = resolved(model={"encoder": {"name": "mlp", "widths": [13, 7], "activation": "elu", "batch_norm": True}})
    assert (mlp.decoder.config.widths, mlp.decoder.config.activation, mlp.decoder.config.batch_norm) == ((7, 13), "elu", True)
    conv = resolved((1, 8, 8), model=NETWORKS["conv, deep and wide"])
    assert (conv.decoder.config.channels, conv.decoder.config.kernel) == ((5, 2, 3), 5)


def test_conv_refuses_what_has_no_grid():
    with pytest.raises(RecipeError, match=r"model.encoder.name = conv: needs images .* has shape \(7,\)"):
        resolved((7,), model=NETWORKS["conv"])


ACTIVATIONS = {
    "relu": lambda a: a.clamp_min(0),
    "leaky_relu": lambda a: a.where(a > 0, 0.01 * a),
    "elu": lambda a: a.where(a > 0, a.exp() - 1),
    "silu": lambda a: a / (1 + (-a).exp()),
    "softplus": lambda a: (1 + a.exp()).log(),
    "softsign": lambda a: a / (1 + a.abs()),
    "tanh": lambda a: 1 - 2 / ((2 * a).exp() + 1),
    "hardtanh": lambda a: a.clamp(-1, 1),
    "sigmoid": lambda a: 1 / (1 + (-a).exp()),
    "identity": lambda a: a,
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / 2**0.5)),
    "mish": lambda a: a * (1 + a.exp()).log().tanh(),
    "selu": lambda a: 1.0507009873554805 * a.where(a > 0, 1.6732632423543772 * (a.exp() - 1)),
    "celu": lambda a: a.where(a > 0, a.exp() - 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_formula(name):
    a = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(activation(name)(a), ACTIVATIONS[name](a), rtol=1e-10, atol=1e-12)


# --- taps


def test_layers_are_tapped_by_name():
    model = fresh(
        resolved(model={"encoder": {"name": "mlp", "widths": [13, 7], "activation": "relu"}, "decoder": {"name": "mlp"}})
    )
    trace = model(batch_of((7,)), BOTH)
    assert {name: tuple(h.shape) for name, h in trace.taps.items()} == {
        "input": (B, 7),
        "h1": (B, 13),
        "h2": (B, 7),
        "code": (B, K),
        "d1": (B, 7),
        "d2": (B, 13),
    }
    assert [h.shape[1] for h in trace.layers(["h*"])] == [13, 7]
    assert set(model(batch_of((7,))).taps) == {"input", "h1", "h2", "code"}  # nobody asked for the decoder


def test_a_layer_has_one_name():
    run = Pass()
    run.tap(torch.zeros(1), "h1")
    with pytest.raises(ValueError, match="'h1' was tapped twice"):
        run.tap(torch.zeros(1), "h1")


class AddOne(ssl_ae.Regularizer):
    name = "add_one"

    def perturb(self, h, layer):
        return h + 1


class Double(ssl_ae.Regularizer):
    name = "double"

    def perturb(self, h, layer):
        return 2 * h


def test_perturbations_act_in_order_on_the_layers_they_name():
    found = resolved(extra=[(AddOne,), (Double,)])
    model = fresh(found)
    x = batch_of((7,)).x
    assert torch.equal(model(Batch(x=x)).taps["input"], 2 * (x + 1))
    model.regularizers[0].layers = ("h*", "code")
    taps = model(Batch(x=x)).taps
    assert torch.equal(taps["input"], 2 * x)
    plain = fresh(resolved())(Batch(x=2 * x)).taps
    assert torch.equal(taps["h1"], plain["h1"] + 1)


# --- seeds, modes


def test_weights_depend_on_the_seed_alone_and_a_head_changes_none():
    found = resolved()
    assert_same(weights(fresh(found)), weights(fresh(found)))
    without = weights(fresh(found, head=False))
    assert_same({name: weights(fresh(found))[name] for name in without}, without)
    assert any(not torch.equal(value, weights(fresh(found, seed=1))[name]) for name, value in without.items())


def test_frozen_gives_each_module_its_own_mode_back():
    model = fresh(resolved())
    model.decoder.eval()
    with frozen(model):
        assert not any(module.training for module in model.modules())
    assert model.encoder.training
    assert not model.decoder.training


def test_a_head_on_stored_codes_sees_what_it_saw_in_the_model():
    found = resolved()
    model = fresh(found).eval()
    x = batch_of((7,)).x
    codes = on_codes(model.head, found.shapes)
    assert torch.equal(codes.predict(model.features(x)).logits, model.predict(x).logits)


def test_layers_of_the_recipe_replace_a_regularizers_own():
    assert part(AddOne, layers=("h1",)).build(resolved().shapes).layers == ("h1",)
    assert part(AddOne).build(resolved().shapes).layers == ("input",)


def test_batches_fill_in_what_unlabelled_data_leaves_out():
    batch = Batch(x=torch.zeros(3, 7))
    assert batch.y.tolist() == [-1] * 3
    assert not batch.labeled.any()
    assert batch.uniform.all()
    assert batch.target is batch.x
    regression = Batch(x=torch.zeros(3, 7), y=torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.0, 0.0]]))
    assert regression.labeled.tolist() == [True, False, True]
