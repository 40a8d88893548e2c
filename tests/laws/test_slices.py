"""A plan with slices: who trains, whose figures are whose, and that early stopping watches the last phase alone."""

import itertools

import pytest
import torch
from claim_kit import Stacked, StackedDecoder
from engine_kit import Keep, assert_same, feed_of, fresh, gradients, judge, plan_of, recipe, resolved, rows, trainer_of, weights

from ssl_ae import Batch
from ssl_ae.errors import RecipeError
from ssl_ae.hookspecs import hookimpl
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve
from ssl_ae.stages.training_run import final_metrics

X, _ = rows(23)
SLICES = 2
BATCH = 8  # ceil(23 / 8) = 3 steps a pass, ceil(2 * 23 / 8) = 6 for two


class Plugin:
    """The kit's components as a plugin's."""

    @hookimpl
    def ssl_ae_encoders(self):
        return [Stacked]

    @hookimpl
    def ssl_ae_decoders(self):
        return [StackedDecoder]


def sliced(**pretrain):
    """Two slices of the test's own making, resolved as if plugins had brought them."""
    registry = Registry.discover()
    registry.add("kit", Plugin())
    model = {"encoder": {"name": "stacked"}, "decoder": {"name": "stacked"}}
    return resolve(recipe(model=model, pretrain={"batch_size": BATCH, **pretrain}), registry, resolved().card)


def trainer(**pretrain):
    return trainer_of(sliced(**pretrain), "pretrain", feed_of(X))


def judging(some, slices, whole):
    """Validation that gives these losses, epoch after epoch."""
    losses = {"slice": iter(slices), "whole": iter(whole)}
    kept = {"slice": [], "whole": []}

    def validate(model, objective):
        kind = "whole" if model is some.model else "slice"
        kept[kind].append(weights(some.model))
        return {"loss": next(losses[kind])}

    some.validate = validate
    return kept


@pytest.mark.parametrize(
    ("given", "passes"),
    [({"epochs": 4}, [4, 4, 4]), ({"epochs": 4, "slice_epochs": 1}, [1, 1, 4]), ({"epochs": 4, "slice_epochs": 0}, [4])],
)
def test_slices_come_first_and_then_the_whole(given, passes):
    found = sliced(**given)
    plan = plan_of(found, fresh(found), "pretrain", feed_of(X))
    assert [phase.epochs for phase in plan.phases] == passes
    assert [phase.slice for phase in plan.phases] == [*range(len(passes) - 1), None]
    assert [phase.prefix for phase in plan.phases] == [*(f"slice-{k + 1}/" for k in range(len(passes) - 1)), ""]
    assert (plan.epochs, plan.rotate) == (sum(passes), False)
    starts = list(itertools.accumulate([0, *(plan.steps_of(phase) for phase in plan.phases)]))
    assert [plan.at(step) for step in starts[:-1]] == [(index, 0) for index in range(len(passes))]
    assert plan.steps == starts[-1]


def test_every_slice_has_figures_of_its_own():
    """A slice's l_X is of a layer, not of samples: it is never told as the model's."""
    some = trainer(epochs=1, log_every=1)
    some.listener, some.validate = Keep(), judge(some, feed_of(X))
    some.run()
    told = [{name for name in values if name != "train/lr"} for _, values in some.listener.measures]
    assert told == [{f"train/{prefix}reconstruction"} for prefix in ("slice-1/", "slice-2/", "") for _ in range(3)]
    judged = [(epoch, step, min(values)) for epoch, step, values in some.listener.epochs]
    assert judged == [(1, 3, "val/slice-1/loss"), (2, 6, "val/slice-2/loss"), (3, 9, "val/loss")]
    final = final_metrics(some.progress)
    for prefix in ("slice-1/", "slice-2/", ""):
        assert {f"train/{prefix}reconstruction", f"val/{prefix}loss", f"val/{prefix}mse"} <= set(final)


def test_a_slice_is_judged_on_what_it_rebuilds():
    """The mse of slice 2 is of the first layer's activations, by hand."""
    some, states = trainer(epochs=1), []
    judged = judge(some, feed_of(X))
    some.validate = lambda part, objective: states.append(weights(some.model)) or judged(part, objective)
    some.run()
    model, x = fresh(sliced()), torch.from_numpy(X)
    model.load_state_dict(states[1])  # as it was when slice 2 was judged
    with torch.no_grad():
        h = torch.sigmoid(x @ model.encoder.first.linear.weight.T + model.encoder.first.linear.bias)
        code = torch.sigmoid(h @ model.encoder.second.linear.weight.T + model.encoder.second.linear.bias)
        mse = float((h - model.decoder.first.linear(code)).square().mean())
    (entry,) = [entry for entry in some.progress.history if "val/slice-2/mse" in entry]
    assert entry["val/slice-2/mse"] == pytest.approx(mse, rel=1e-9)


def test_the_sum_of_the_phases_is_the_plan():
    """Greedy by hand: the slices one after another as autoencoders of their own, and then the whole, to the bit."""
    some = trainer(epochs=2, slice_epochs=1)
    some.run()
    by_hand = trainer(epochs=2, slice_epochs=1)
    batches = by_hand.feed.batches((by_hand.runs[phase].phase.draw, k) for phase, k in map(by_hand.plan.at, range(12)))
    for run, steps in zip(by_hand.runs, (3, 3, 6), strict=True):
        for _ in range(steps):
            by_hand.make_step(run, [next(batches)])
            by_hand.progress.step += 1
    assert_same(weights(some.model), weights(by_hand.model))


@pytest.mark.parametrize("k", range(SLICES))
def test_the_gradient_of_a_slice_is_its_own_reconstruction_alone(k):
    some = trainer()
    some.make_step(some.runs[k], [Batch(x=torch.from_numpy(X[:BATCH]))])
    reference = fresh(sliced())
    h = torch.from_numpy(X[:BATCH])
    if k:
        h = reference.encoder.first.linear(h).sigmoid().detach()
    enc = (reference.encoder.first, reference.encoder.second)[k].linear
    dec = (reference.decoder.second, reference.decoder.first)[k].linear
    (0.5 * (h - dec(enc(h).sigmoid())).square().sum(1)).mean().backward()
    assert_same(gradients(some.model), gradients(reference), atol=1e-12)


# --- early stopping


def test_early_stopping_watches_the_last_phase_alone():
    """The slices' losses are better than any of the whole's, and then worse: neither keeps nor stops anything."""
    some = trainer(epochs=5, slice_epochs=3, early_stopping={"metric": "val/loss", "patience": 2})
    kept = judging(some, slices=[0.1, 0.2, 0.3, 0.1, 0.2, 0.3], whole=[5.0, 4.0, 6.0, 6.0])
    some.run()
    assert some.progress.epoch == 3 + 3 + 4  # two passes without improvement after the whole's second
    assert (some.progress.best, some.progress.best_epoch) == (4.0, 3 + 3 + 2)
    assert_same(weights(some.model), kept["whole"][1])
    assert final_metrics(some.progress)["val/loss"] == 4.0


def test_a_whole_that_never_stops_improving_makes_all_its_passes():
    some = trainer(epochs=3, slice_epochs=2, early_stopping={"metric": "val/loss", "patience": 1})
    judging(some, slices=[1.0, 2.0, 3.0, 4.0], whole=[7.0, 6.0, 5.0])
    some.run()
    assert (some.progress.epoch, some.progress.best_epoch) == (7, 7)


# --- recipes that cannot be


def test_slices_of_an_encoder_that_has_none_are_refused():
    with pytest.raises(RecipeError, match=r"pretrain.slice_epochs = 3: encoder builtins/mlp has no slices to train one by one"):
        resolved(pretrain={"slice_epochs": 3})


def test_a_decoder_that_has_fewer_slices_is_refused_unless_they_do_not_train():
    registry = Registry.discover()
    registry.add("kit", Plugin())
    model = {"encoder": {"name": "stacked"}, "decoder": {"name": "linear"}}
    with pytest.raises(RecipeError, match=r"model.decoder.name = builtins/linear: .* in 2 slices, .* this one has 1"):
        resolve(recipe(model=model), registry, resolved().card)
    found = resolve(recipe(model=model, pretrain={"slice_epochs": 0}), registry, resolved().card)
    trained = trainer_of(found, "pretrain", feed_of(X))
    trained.run()
    assert [run.phase.name for run in trained.runs] == ["pretrain"]


def test_options_of_a_phase_are_its_own_schedule():
    """A slice's learning rate goes through the whole schedule, and the next one starts anew."""
    some = trainer(epochs=2, slice_epochs=1, log_every=1, schedule={"name": "linear"}, optimizer={"name": "sgd", "lr": 1.0})
    some.listener = Keep()
    some.run()
    rates = [values["train/lr"] for _, values in some.listener.measures]
    falling = [[1 - step / steps for step in range(1, steps + 1)] for steps in (3, 3, 6)]
    assert rates == pytest.approx(list(itertools.chain(*falling)))
