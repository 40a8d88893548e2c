"""Passes through a model: how many there are, who learns from them, which is a step; and slices, which are models too."""

import dataclasses

import pytest
import torch
from claim_kit import WIDTH, DecoderLayer, Normalises, Stacked, StackedDecoder, own
from engine_kit import assert_same, feed_of, fresh, judge, recipe, resolved, rows, trainer_of, weights

import ssl_ae
from ssl_ae import Batch, Need
from ssl_ae.errors import RecipeError
from ssl_ae.model import Slice, check_layers, frozen
from ssl_ae.moments import MOMENTUM
from ssl_ae.testing.companions import PlainDecoder

B, K = 11, 5
X = torch.from_numpy(rows(B)[0])
STEP = torch.tensor(5)


class AddOne(ssl_ae.Regularizer):
    name = "add_one"

    def perturb(self, h, layer):
        return h + 1


class Watched(Normalises):
    """Normalises h1, and remembers each pass through it, its step and whether it may learn."""

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.runs, self.steps, self.learns = [], [], []

    def forward(self, x, run):
        self.runs.append(run)
        self.learns.append(run.learn)
        self.steps.append(None if run.step is None else int(run.step))
        return super().forward(x, run)


class Noisy(Watched):
    """Disturbs h1 by itself in every step."""

    name = "noisy"
    noisy = True

    def forward(self, x, run):
        return super().forward(x if run.step is None else x + torch.randn_like(x), run)


def watched(cls=Watched, *regularizers):
    return fresh(dataclasses.replace(resolved(extra=[(r,) for r in regularizers]), encoder=own("encoder", cls)))


def test_undisturbed_layers_cost_no_second_pass():
    model = watched()
    trace = model(Batch(x=X), frozenset({Need.CLEAN, Need.RECONSTRUCTION}), step=STEP)
    assert len(model.encoder.runs) == 1
    assert trace.clean["h1"] is trace.taps["h1"]
    assert torch.equal(trace.clean["code"], trace.q.mean)
    assert trace.clean_stats["h1"] is model.encoder.runs[0].stats["h1"]


@pytest.mark.parametrize("parts", [(Watched, AddOne), (Noisy,)], ids=["a regularizer", "the encoder itself"])
def test_where_something_disturbs_them_they_are_another_pass(parts):
    model = watched(*parts)
    trace = model(Batch(x=X), frozenset({Need.CLEAN}), step=STEP)
    disturbed, clean = model.encoder.runs
    assert not torch.equal(trace.clean["h1"], trace.taps["h1"])
    assert trace.clean_stats["h1"] is clean.stats["h1"]
    h = model.encoder.linear(X)
    torch.testing.assert_close(clean.stats["h1"][0], h.mean(0))
    assert not torch.allclose(disturbed.stats["h1"][0], h.mean(0))


@pytest.mark.parametrize("cls", [Watched, Noisy])
def test_in_evaluation_nothing_disturbs(cls):
    model = watched(cls, AddOne).eval()
    trace = model(Batch(x=X), frozenset({Need.CLEAN}))
    assert len(model.encoder.runs) == 1
    assert torch.equal(trace.clean["input"], X)


@pytest.mark.parametrize(
    ("cls", "regularizers", "needs", "learners"),
    [
        (Watched, (), {Need.CLEAN}, [True]),
        (Watched, (), {Need.VIEW}, [True, False]),
        (Watched, (AddOne,), set(), [True]),  # nobody asks for undisturbed layers, so there are none to learn from
        (Watched, (AddOne,), {Need.CLEAN, Need.VIEW}, [False, True, False]),
        (Noisy, (), {Need.CLEAN}, [False, True]),
    ],
    ids=["quiet", "view", "noise", "noise, clean and view", "noisy encoder"],
)
def test_of_several_passes_the_undisturbed_one_teaches_the_running_averages(cls, regularizers, needs, learners):
    model = watched(cls, *regularizers)
    model(Batch(x=X), frozenset(needs), step=STEP)
    assert model.encoder.learns == learners
    teacher = model.encoder.runs[learners.index(True)]
    torch.testing.assert_close(model.encoder.moments.mean, MOMENTUM * teacher.stats["h1"][0])  # from 0, and once


class NormalisedDecoder(PlainDecoder):
    """N(norm(W z + b), I)."""

    name = "normalised"

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.moments = ssl_ae.BatchMoments(7)

    def forward(self, z, run):
        return self.output(run.norm(self.linear(z), "d1", self.moments).unflatten(1, (1, 7))), {}


def test_a_decoder_learns_from_the_pass_it_decodes_and_from_no_other():
    """The encoder's disturbed pass is the decoder's only one; looking again, without noise or at other codes, teaches nothing."""
    found = resolved(extra=[(AddOne,)])
    model = fresh(dataclasses.replace(found, encoder=own("encoder", Watched), decoder=own("decoder", NormalisedDecoder)))
    trace = model(Batch(x=X), frozenset({Need.RECONSTRUCTION, Need.CLEAN}))
    before = weights(model)
    raw = model.decoder.linear(trace.z)
    torch.testing.assert_close(before["decoder.moments.mean"], MOMENTUM * raw.mean(0))
    trace.decode(2 * trace.z)
    trace.encode(X)
    trace.predict(X)
    assert_same(weights(model), before)
    with frozen(model):
        model.reconstruct(X)
    assert_same(weights(model), before)


class Contrast(ssl_ae.Regularizer):
    """Distances between two views and the undisturbed code."""

    name = "contrast"
    needs = frozenset({Need.CLEAN, Need.VIEW})

    def penalty(self, trace):
        return sum((q - trace.clean["code"]).square().sum(1) for q in (trace.q.mean, trace.view.q.mean))


def test_the_step_reaches_the_encoder_while_training_and_nowhere_else():
    found = dataclasses.replace(resolved(extra=[(Contrast,)]), encoder=own("encoder", Noisy))
    trainer = trainer_of(found, "pretrain", feed_of(rows(B)[0]))
    encoder, told = trainer.model.encoder, []
    for _ in range(3):
        trainer.make_step(trainer.runs[0], [Batch(x=X)])
        told.append(encoder.steps[-3:])
    assert told == [[0, None, 0], [1, None, 1], [2, None, 2]]  # the disturbed pass, the undisturbed one, the other view
    with frozen(trainer.model):
        trainer.model(Batch(x=X), frozenset({Need.CLEAN, Need.VIEW}))
        trainer.model.reconstruct(X)
    judge(trainer, feed_of(rows(B)[0]))(trainer.model)
    assert set(encoder.steps[9:]) == {None}


# --- slices


def sliced(*regularizers):
    found = resolved(extra=[(r,) for r in regularizers])
    return dataclasses.replace(found, encoder=own("encoder", Stacked), decoder=own("decoder", StackedDecoder))


def test_a_slice_of_a_model_is_a_model_on_what_the_parts_below_give():
    model = fresh(sliced())
    first, second = Slice(model, 0), Slice(model, 1)
    assert torch.equal(first(Batch(x=X), frozenset({Need.RECONSTRUCTION})).batch.x, X)
    trace = second(Batch(x=X), frozenset({Need.RECONSTRUCTION}))
    below = torch.sigmoid(X @ model.encoder.first.linear.weight.T + model.encoder.first.linear.bias)
    torch.testing.assert_close(trace.batch.x, below)
    torch.testing.assert_close(trace.batch.target, below)
    assert not trace.batch.x.requires_grad
    assert (trace.q.event_shape, trace.p_x.event_shape) == ((K,), (WIDTH,))
    names = {name for name, p in model.named_parameters() if any(p is q for q in second.parameters())}
    assert names == {f"{part}.linear.{kind}" for part in ("encoder.second", "decoder.first") for kind in ("weight", "bias")}


def test_a_slice_trains_its_own_parameters_alone():
    """One step of each phase, with a weight penalty and noise; to the bit for all the others."""
    found = dataclasses.replace(sliced(AddOne), recipe=recipe(pretrain={"slice_epochs": 1}))
    trainer = trainer_of(found, "pretrain", feed_of(rows(B)[0]), fresh(found))
    parts = [{"encoder.first", "decoder.second"}, {"encoder.second", "decoder.first"}]
    for run, own_parts in zip(trainer.runs, [*parts, parts[0] | parts[1]], strict=True):
        before = weights(trainer.model)
        trainer.make_step(run, [Batch(x=X)])
        after = weights(trainer.model)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {name for name in after if name.rsplit(".", 2)[0] in own_parts}


def test_slices_that_do_not_fit_are_refused():
    class Narrow(StackedDecoder):
        def slices(self):
            return DecoderLayer(ssl_ae.Shapes((WIDTH + 1,), self.shapes.latent)), self.second

    found = dataclasses.replace(sliced(), decoder=own("decoder", Narrow))
    message = r"slice 2 of the encoder goes from \(7,\) to 5 numbers, the decoder's from 5 to \(8,\)"
    with pytest.raises(RecipeError, match=message):
        check_layers(fresh(found), found.shapes)
