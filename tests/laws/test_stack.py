"""The stack, layer by layer: who trains when, on what, and that the whole is a deep network afterwards."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_kit import (
    CONSTANT,
    SGD,
    Keep,
    assert_same,
    feed_of,
    fresh,
    gradients,
    judge,
    part,
    plan_of,
    resolved,
    rows,
    trainer_of,
    weights,
)
from scipy.special import expit
from sklearn.datasets import load_digits
from ssl_ae_builtins.grayscale import Grayscale

from ssl_ae import Batch
from ssl_ae.checkpoint import load_checkpoint, save_checkpoint
from ssl_ae.data.card import Y as Labels
from ssl_ae.errors import RecipeError, Stopped
from ssl_ae.model import Slice
from ssl_ae.objective import RECONSTRUCTION
from ssl_ae.training import micro_batches

X, Y = rows(23, labeled=0.6)
STACK = {"encoder": {"name": "stack", "widths": [11, 13]}}
SLICES = 3
# a slice's own layers, from x to the code: encoder.layers.k with what mirrors it in the decoder
OWN = [
    ("encoder.layers.0.", "decoder.linear."),
    ("encoder.layers.1.", "decoder.layers.blocks.1."),
    ("encoder.layers.2.", "decoder.layers.blocks.0."),
]


def stacked(regularizers=(), extra=(), shape=(7,), **pretrain):
    options = {"epochs": 3, "slice_epochs": 2, "batch_size": 8, "log_every": 4, **pretrain}
    model = STACK | {"regularizers": list(regularizers)}
    finetune = {"optimizer": SGD, "schedule": CONSTANT}
    return resolved(shape, model=model, pretrain=options, finetune=finetune, extra=extra)


def trainer(x=X, **options):
    found = stacked(**options)
    return trainer_of(found, "pretrain", feed_of(x), fresh(found))


# --- who trains when


def test_phases_are_the_declared_plan():
    """23 rows by 8: ceil(2 * 23 / 8) = 6 steps a slice, ceil(3 * 23 / 8) = 9 of the whole; 6 + 6 + 6 + 9 = 27."""
    some = trainer()
    plan = some.plan
    assert [(phase.name, plan.steps_of(phase), phase.slice) for phase in plan.phases] == [
        ("slice-1", 6, 0), ("slice-2", 6, 1), ("slice-3", 6, 2), ("pretrain", 9, None),
    ]  # fmt: skip
    assert (plan.steps, plan.epochs) == (27, 9)
    calls = Counter()
    for k, layer in enumerate(some.model.encoder.layers, start=1):
        layer.register_forward_hook(lambda module, given, out, k=k: calls.update([k]))
    some.run()
    assert some.progress.step == 27
    # layer 1 runs in every step, as does each layer from its own slice on: in slice k the layers below see x and the target
    assert calls == {1: 6 + 2 * 6 + 2 * 6 + 9, 2: 6 + 2 * 6 + 9, 3: 6 + 9}


@pytest.mark.parametrize(
    ("given", "expected"), [({}, [4, 4, 4, 4]), ({"slice_epochs": 1}, [1, 1, 1, 4]), ({"slice_epochs": 0}, [4])]
)
def test_a_slice_makes_as_many_passes_as_the_recipe_says(given, expected):
    found = resolved(model=STACK, pretrain={"epochs": 4, **given})
    plan = plan_of(found, fresh(found), "pretrain", feed_of(X))
    assert [phase.epochs for phase in plan.phases] == expected


@pytest.mark.parametrize("micro", [1, 2])
def test_the_phase_of_a_slice_changes_no_other_layer(micro):
    """Also with momentum and weight decay, which move parameters that have no gradient but a place in the optimizer."""
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    some = trainer(optimizer=optimizer, micro_batches=micro, regularizers=[{"name": "masking_noise"}, {"name": "weights"}])
    states = [weights(some.model)]
    some.validate = lambda model, objective: states.append(weights(some.model)) or {}
    some.run()
    states = [states[0], *states[2:7:2], states[-1]]  # slices make two epochs each
    for k, (before, after) in enumerate(pairwise(states)):
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        own = {name for name in after if name.startswith(OWN[k] if k < SLICES else ("encoder.", "decoder."))}
        assert changed == own, k


# --- on what


def numpy_layers(model, x):
    """sigmoid(W h + b) of each layer by hand."""
    layers = [x]
    for layer in model.encoder.layers:
        w, b = (p.detach().numpy() for p in layer[0].parameters())
        layers.append(expit(layers[-1] @ w.T + b))
    return layers


@pytest.mark.parametrize("k", range(SLICES))
def test_a_slice_rebuilds_the_undisturbed_output_of_the_layers_below(k):
    model = fresh(stacked([{"name": "masking_noise"}]))
    expected = numpy_layers(model, X)[k]
    trace = Slice(model, k)(Batch(x=torch.from_numpy(X)), RECONSTRUCTION.needs)
    np.testing.assert_allclose(trace.batch.x, expected, rtol=1e-12)
    np.testing.assert_allclose(trace.batch.target, expected, rtol=1e-12)
    kept = trace.taps["input"] != 0
    assert 0.6 < float(kept.double().mean()) < 0.9  # of which the mask of 25 % took some, in this slice's own input
    np.testing.assert_allclose(trace.taps["input"].where(kept, 0), torch.from_numpy(expected).where(kept, 0), rtol=1e-12)


@pytest.mark.parametrize("k", range(SLICES))
def test_the_gradient_of_a_slice_is_that_of_an_autoencoder_of_one_layer(k):
    """mean_i 1/2 |h_k - f(V f(W h_k + b) + c)|^2 written out (the outermost decoder layer is linear: x has no range)."""
    some = trainer()
    reference = fresh(stacked())
    enc = reference.encoder.layers[k][0]
    dec = reference.decoder.linear if k == 0 else reference.decoder.layers.blocks[2 - k][0]
    h = torch.from_numpy(numpy_layers(reference, X[:8])[k])
    code = torch.sigmoid(h @ enc.weight.T + enc.bias)
    rebuilt = code @ dec.weight.T + dec.bias
    rebuilt = rebuilt if k == 0 else torch.sigmoid(rebuilt)
    (0.5 * (h - rebuilt).square().sum(1)).mean().backward()
    some.make_step(some.runs[k], [Batch(x=torch.from_numpy(X[:8]))])
    assert_same(gradients(some.model), gradients(reference), atol=1e-12)


def test_a_penalty_acts_in_the_slices_that_have_its_layer():
    """h1 is the first slice's code; the code is every slice's own."""
    of_h1 = trainer(regularizers=[{"name": "sparse_l1", "layers": ["h1"]}])
    assert [[term.name for term in phase.objective.terms] for phase in of_h1.plan.phases] == [
        ["reconstruction", "sparse_l1"], ["reconstruction"], ["reconstruction"], ["reconstruction", "sparse_l1"],
    ]  # fmt: skip
    of_codes = trainer(regularizers=[{"name": "sparse_l1"}])
    assert all("sparse_l1" in [term.name for term in phase.objective.terms] for phase in of_codes.plan.phases)


def test_what_changes_samples_acts_below_the_slices():
    """Grey pictures in: the first slice learns colours, the next see what the first makes of grey and rebuild that."""
    x = torch.rand(5, 3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = stacked(shape=(3, 4, 7), extra=[(Grayscale,)])
    model = fresh(found)
    grey = part(Grayscale).build(found.shapes).perturb(x, "input")
    first = Slice(model, 0)(Batch(x=x))
    assert torch.equal(first.taps["input"], grey)
    assert torch.equal(first.batch.target, x)
    second = Slice(model, 1)(Batch(x=x))
    expected = numpy_layers(model, grey.flatten(1).numpy())[1]
    np.testing.assert_allclose(second.taps["input"], expected, rtol=1e-12)
    np.testing.assert_allclose(second.batch.target, expected, rtol=1e-12)


# --- the loop's promises hold


@pytest.mark.parametrize("steps", [3, 8, 20], ids=["in slice 1", "in slice 2", "in the whole"])
def test_resumed_in_a_slice_equals_uninterrupted(steps, tmp_path, monkeypatch):
    options = {
        "regularizers": [{"name": "masking_noise"}],
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": {"name": "cosine"},
        "ema": 0.9,
    }
    whole = trainer(**options)
    whole.run()
    first = trainer(**options)
    first.save = lambda checkpoint: save_checkpoint(tmp_path, checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("ssl_ae.distributed.Agreement.asked", lambda self, here, step: step == steps)
        with pytest.raises(Stopped, match=f"stopped after step {steps} of 27"):
            first.run()
    second = trainer(**options)
    with torch.no_grad():
        for p in second.model.parameters():
            p.zero_()
    second.restore(load_checkpoint(tmp_path, []))
    second.run()
    assert_same(weights(second.model), weights(whole.model))
    assert_same(weights(second.result), weights(whole.result))
    assert second.progress.history == whole.progress.history


def test_each_slice_has_curves_of_its_own():
    """Its readings bear its name; early stopping watches the whole alone."""
    listener = Keep()
    some = trainer(log_every=1, early_stopping={"metric": "val/loss", "patience": 9})
    some.listener, some.validate = listener, judge(some, feed_of(X))
    some.run()
    names = [{name for name in values if name != "train/lr"} for _, values in listener.measures]
    expected = [*(f"train/slice-{k}/reconstruction" for k in (1, 2, 3) for _ in range(6)), *["train/reconstruction"] * 9]
    assert names == [{name} for name in expected]
    judged = [sorted(values) for _, _, values in listener.epochs]
    of = [f"val/slice-{k}/" for k in (1, 2, 3) for _ in range(2)] + ["val/"] * 3
    assert judged == [[f"{prefix}{name}" for name in ("loss", "mse", "reconstruction")] for prefix in of]
    assert some.progress.best_epoch > 6


def test_micro_batches_give_the_same_step():
    one, four = trainer(), trainer()
    batch = Batch(x=torch.from_numpy(X[:8]))
    one.make_step(one.runs[1], [batch])
    four.make_step(four.runs[1], micro_batches(batch, 4))
    assert_same(gradients(four.model), gradients(one.model), atol=1e-12)


# --- the whole is a deep network


def test_back_propagation_reaches_every_layer_end_to_end():
    found = stacked()
    model = fresh(found)
    before = weights(model)
    trainer_of(found, "end-to-end", feed_of(X, Y), model).run()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("encoder.", "head."))}


def test_a_stack_becomes_a_classifier_of_digits():
    """64-49-25-16 from one pass of greedy learning on 700 digits and end-to-end training; chance is 10 %."""
    x, y = load_digits(return_X_y=True)
    x = x / 16
    model = {"latent_dim": 16, "encoder": {"name": "stack", "widths": [49, 25], "activation": "tanh"}}
    adam = {"optimizer": {"name": "adam", "lr": 3e-3}, "batch_size": 50}
    found = resolved(
        (64,),
        y=Labels(task="classes", names=tuple("0123456789")),
        model=model,
        pretrain=adam | {"epochs": 5},
        finetune=adam | {"epochs": 20},
    )
    trained = fresh(found, dtype=torch.float32)
    dtype = {"dtype": torch.float32}
    trainer_of(found, "pretrain", feed_of(x[:700], **dtype), trained).run()
    trainer_of(found, "end-to-end", feed_of(x[:700], y[:700], **dtype), trained).run()
    guessed = trained.predict(torch.from_numpy(x[700:1400]).float()).logits.argmax(1).numpy()
    assert (guessed == y[700:1400]).mean() > 0.8


# --- recipes that cannot be


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"encoder": {"name": "stack", "widths": []}}, "one layer is no stack"),
        ({**STACK, "decoder": {"name": "linear"}}, "the decoder must have as many; this one has 1"),
        ({**STACK, "decoder": {"name": "mlp", "widths": [9]}}, "the encoder trains in 3 slices, the decoder must have as many"),
    ],
)
def test_refused(model, message):
    with pytest.raises(RecipeError, match=message):
        resolved(model=model)
