"""Sparse by KL(rho) and by L1: closed forms, the delta rule, one step however the rows are split, and what training reaches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_kit import assert_same, cut, feed_of, fresh, gradients, part, resolved, rows, trainer_of
from scipy.special import rel_entr
from sklearn.datasets import load_digits
from ssl_ae_builtins.penalties import SparseL1
from ssl_ae_builtins.sparse_kl import SparseKl

import ssl_ae
from ssl_ae import Batch, Need, Over, Shapes, Trace
from ssl_ae.errors import PluginError, RecipeError
from ssl_ae.objective import StepMeans, count_rows, penalty

SHAPES = Shapes(x=(7,), latent=5, classes=3)
SIGMOID_CODE = {"name": "mlp", "widths": [], "code_activation": "sigmoid"}
SIGMOID_LAYERS = {"name": "mlp", "widths": [11, 13], "activation": "sigmoid"}
DIGITS = (load_digits().data[:599] / 16).astype(np.float32)


def sparse_kl(**options):
    return part(SparseKl, options=options).build(SHAPES)


def bernoulli_kl(rho, activity):
    """KL(Bernoulli(rho) || Bernoulli(activity)) by scipy's x log(x / y)."""
    return rel_entr(rho, activity) + rel_entr(1 - rho, 1 - activity)


def trained(encoder, regularizers, epochs, latent=96):
    """Codes (N, K) of digits after training with a linear decoder."""
    found = resolved(
        shape=(64,),
        model={"latent_dim": latent, "encoder": encoder, "decoder": {"name": "linear"}, "regularizers": regularizers},
        pretrain={"epochs": epochs, "batch_size": 128, "optimizer": {"name": "adam", "lr": 0.01}, "schedule": {"name": "cosine"}},
    )
    trainer = trainer_of(found, "pretrain", feed_of(DIGITS, dtype=torch.float32), fresh(found, dtype=torch.float32))
    trainer.run()
    with torch.no_grad():
        return trainer.model.eval().features(torch.from_numpy(DIGITS))


# --- KL(rho)


def test_the_penalty_is_the_sum_of_divergences_over_units():
    h1, code = torch.rand(19, 2, 3, dtype=torch.float64), torch.rand(19, 5, dtype=torch.float64)
    trace = Trace(model=None, taps={"h1": h1, "code": code}, step_mean=lambda value: value.mean(0))
    of_code = bernoulli_kl(0.13, code.mean(0).numpy()).sum()
    assert float(sparse_kl(rho=0.13).penalty(trace)) == pytest.approx(of_code, rel=1e-12)
    both = part(SparseKl, options={"rho": 0.13}, layers=("h*", "code")).build(SHAPES).penalty(trace)
    assert float(both) == pytest.approx(of_code + bernoulli_kl(0.13, h1.mean(0).numpy()).sum(), rel=1e-12)


@pytest.mark.parametrize(("encoder", "layer"), [(SIGMOID_CODE, "code"), (SIGMOID_LAYERS, "h2")])
def test_the_gradient_is_the_delta_rule(encoder, layer):
    """dJ/ds_nj = beta (-rho / rho_j + (1 - rho) / (1 - rho_j)) f'(s_nj) / N at the pre-activations s (Ng 2011, sec. 3)."""
    beta, rho, count = 3.0, 0.2, 19
    entry = {"name": "sparse_kl", "rho": rho, "layers": [layer]}
    model = fresh(resolved(model={"encoder": encoder, "regularizers": [entry]}))
    linear = model.encoder.latent.linear if layer == "code" else model.encoder.layers.blocks[1][0]
    seen = []
    linear.register_forward_hook(lambda module, given, out: seen.append(out))
    batch = Batch(x=torch.from_numpy(rows(count)[0]))
    divisor = count_rows([batch])
    trace = model(batch, frozenset({Need.STEP_MEAN}), StepMeans(divisor, several=False))
    shares = penalty(model.regularizers[0]).shares(trace, divisor)
    (s,) = seen
    (found,) = torch.autograd.grad(beta * shares.sum(), s)
    h = 1 / (1 + (-s.detach()).exp())
    mean = h.mean(0)
    expected = beta * (-rho / mean + (1 - rho) / (1 - mean)) * h * (1 - h) / count
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)


def test_a_unit_that_never_or_always_fires_has_a_finite_penalty():
    """Saturated sigmoids are 0 and 1 exactly in float32, and dropout on the layer can lift a mean above 1."""
    activity = torch.tensor([[0.0, 1.0, 1.25, 0.5]], requires_grad=True)
    value = sparse_kl(rho=0.05).penalty(Trace(model=None, taps={"code": activity}, step_mean=lambda value: value.mean(0)))
    assert bool(value.isfinite())
    value.backward()
    assert bool(activity.grad.isfinite().all())
    assert activity.grad.tolist()[0] == pytest.approx([0.0, 0.0, 0.0, -0.05 / 0.5 + 0.95 / 0.5], rel=1e-6)


@pytest.mark.parametrize("groups", [[range(4), range(4, 8)], [range(1), range(1, 3), range(3, 8)]])
def test_micro_batches_make_the_same_step(groups):
    """The mean is over the whole step, not over a part: parts of any size give the gradient of the whole."""
    found = resolved(model={"encoder": SIGMOID_CODE, "regularizers": [{"name": "sparse_kl", "weight": 0.7}]})
    batch = Batch(x=torch.from_numpy(rows(8)[0]))

    def gradient(parts):
        trainer = trainer_of(found, "pretrain", feed_of(batch.x.numpy()))
        trainer.make_step(trainer.runs[0], parts)
        return gradients(trainer.model)

    assert_same(gradient(cut(batch, groups)), gradient([batch]), atol=1e-12)


def test_mean_activity_reaches_rho():
    """Of every one of 96 units of an overcomplete code, within 20 %; without the penalty no unit's is near."""
    rho = 0.1
    free = trained(SIGMOID_CODE, [], epochs=60).mean(0)
    activity = trained(SIGMOID_CODE, [{"name": "sparse_kl", "rho": rho, "weight": 3.0}], epochs=60).mean(0)
    assert float((activity / rho - 1).abs().max()) < 0.2
    assert float(free.mean()) > 3 * rho


@pytest.mark.parametrize(
    ("encoder", "layers", "allowed"),
    [
        ({"name": "mlp"}, ["code"], "none does so"),
        (SIGMOID_LAYERS, ["code"], "only h* does so"),
        (SIGMOID_CODE, ["code", "h*"], "only code does so"),
        (SIGMOID_CODE, ["*"], "only code does so"),
    ],
)
def test_layers_that_have_no_mean_activity_are_refused(encoder, layers, allowed):
    with pytest.raises(RecipeError) as complaint:
        resolved(model={"encoder": encoder, "regularizers": [{"name": "weights"}, {"name": "sparse_kl", "layers": layers}]})
    text = str(complaint.value)
    assert f"model.regularizers.1 (builtins/sparse_kl).layers = {layers}: only a layer with values in [0, 1]" in text
    assert f"of encoder builtins/mlp with these options {allowed}. Give the layer a sigmoid" in text
    assert len(text.splitlines()) == 1


def test_each_entry_answers_for_its_own_layers():
    entries = [{"name": "sparse_kl", "layers": ["h1"]}, {"name": "sparse_kl"}, {"name": "sparse_kl", "layers": ["h*", "code"]}]
    with pytest.raises(RecipeError) as complaint:
        resolved(model={"encoder": SIGMOID_LAYERS, "regularizers": entries})
    places = [line.split(" (")[0] for line in str(complaint.value).splitlines()]
    assert places == ["recipe: model.regularizers.1", "recipe: model.regularizers.2"]


@pytest.mark.parametrize(("encoder", "layers"), [(SIGMOID_CODE, ["code"]), (SIGMOID_LAYERS, ["h1"]), (SIGMOID_LAYERS, ["h*"])])
def test_layers_in_the_unit_interval_are_taken(encoder, layers):
    found = resolved(model={"encoder": encoder, "regularizers": [{"name": "sparse_kl", "layers": layers}]})
    assert found.regularizers[0].layers == tuple(layers)


@pytest.mark.parametrize("over", [Over.ROWS, Over.LABELED, Over.MODEL])
def test_a_mean_over_the_step_asks_for_a_term_of_the_step(over):
    given = over

    with pytest.raises(PluginError, match=rf"Wrong: needs = STEP_MEAN with over = {over}: .*Set over = Over.STEP"):

        class Wrong(ssl_ae.Regularizer):
            name, over, needs = "wrong", given, frozenset({Need.STEP_MEAN})


def test_its_picture_marks_rho():
    code = torch.rand(19, 5)
    (picture,) = sparse_kl(rho=0.07).pictures(Trace(model=None, taps={"code": code}))
    torch.testing.assert_close(picture.values, code.mean(0))
    assert picture.marks == {"rho": 0.07}


# --- L1


def test_the_part_of_active_units_falls_with_lambda():
    """Overcomplete relu codes of digits, 96 units for 64 pixels."""
    encoder = {"name": "mlp", "widths": [], "code_activation": "relu"}
    active = [
        float((trained(encoder, [{"name": "sparse_l1", "weight": weight}, {"name": "unit_norm"}], epochs=30) > 0).float().mean())
        for weight in (0.0, 0.03, 0.1, 0.3, 1.0)
    ]
    assert all(a > 1.3 * b for a, b in pairwise(active[:4])), active
    assert active[0] > 0.4
    assert active[4] < 0.01  # lambda above the gain of any unit


def test_the_picture_of_activity():
    """The part of units that are not 0 in each row; where none ever is, their sizes."""
    regularizer = part(SparseL1).build(SHAPES)
    code = torch.tensor([[0.0, -2.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 3.0]])
    (picture,) = regularizer.pictures(Trace(model=None, taps={"code": code}))
    assert picture.values.tolist() == pytest.approx([0.6, 0.2])
    (picture,) = regularizer.pictures(Trace(model=None, taps={"code": code - 7}))
    torch.testing.assert_close(picture.values, 7 - code.flatten())
