"""Joint, alternating and end-to-end: what each minimises, and that unlabelled rows enter where they should and nowhere else."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from engine_kit import MeanCode, assert_same, cut, feed_of, fresh, gradients, resolved, rows, trainer_of, weights

from ssl_ae.data.card import Y as Labels
from ssl_ae.data.loading import Draw
from ssl_ae.objective import SUPERVISED, count_rows
from ssl_ae.plan import Plan
from ssl_ae.trace import Batch

X, Y = rows(29, labeled=0.4)
ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}
DIAG = {"name": "mlp", "widths": [11], "activation": "tanh", "posterior": "diag"}


# two targets; of the labelled rows, one knows the first alone and one the second alone
VALUES = np.where((Y >= 0)[:, None], np.random.default_rng(1).normal(size=(29, 2)) * [40, 0.1] + [700, -3], np.nan)
VALUES[np.flatnonzero(Y >= 0)[[0, 1]], [1, 0]] = np.nan
MARKS = np.where(np.isnan(VALUES), np.nan, VALUES - np.nanmean(VALUES, 0) > 0)
TASKS = {
    "classes": ({"name": "softmax"}, Labels(task="classes", names=("a", "b", "c")), Y),
    "regression": ({"name": "gaussian"}, Labels(task="regression", names=("u", "v")), VALUES),
    "least squares": ({"name": "gaussian", "variance": "unit"}, Labels(task="regression", names=("u", "v")), VALUES),
    "multi-label": ({"name": "bernoulli"}, Labels(task="multilabel", names=("u", "v")), MARKS),
}


def batch_of(pick, y=Y):
    return Batch(x=torch.from_numpy(X[pick]), y=torch.from_numpy(y[pick]))


def one_step(found, mode, batch, phase=0, model=None, y=Y):
    model = model or fresh(found)
    model.head.prepare(torch.from_numpy(y[Y >= 0]))
    trainer = trainer_of(found, mode, feed_of(X, y), model)
    trainer.make_step(trainer.runs[phase], [batch])
    return trainer


def summed(*parts):
    names = set().union(*parts)
    return {name: sum(part[name] for part in parts if name in part) for name in names}


# --- what each mode minimises


def by_hand(found, task):
    """Gradients of l_Y, a mean over the labelled rows, and of l_X + 0.2 |z|_1, a mean over all, by autograd of bare formulas."""
    model, (_, _, y) = fresh(found), TASKS[task]
    x, y, labeled = torch.from_numpy(X), torch.from_numpy(y), torch.from_numpy(Y >= 0)
    z = model.features(x)
    raw = model.head.linear(z)[labeled]
    target, there = y[labeled], ~y[labeled].isnan()
    if task == "classes":
        each = -raw.log_softmax(1).gather(1, target[:, None])[:, 0]
    elif task == "multi-label":
        each = torch.where(there, torch.nn.functional.softplus(raw) - target.nan_to_num() * raw, 0.0).sum(1)
    else:
        mean = target.nanmean(0)
        sd = (target - mean).square().nanmean(0).sqrt()
        noise = 1.0 if task == "least squares" else torch.nn.functional.softplus(model.head.units.raw_std) + 1e-3
        misses = (((target - mean) / sd).nan_to_num() - raw) / noise
        each = torch.where(there, 0.5 * misses.square() + (noise * sd).log(), 0.0).sum(1)
    each.mean().backward(retain_graph=True)
    label_side = gradients(model)
    model.zero_grad()
    (0.5 * (x - model.decode(z).mean).square().sum(1) + 0.2 * z.abs().sum(1)).mean().backward()
    return label_side, gradients(model)


def recipe_for(task, **finetune):
    head, labels, _ = TASKS[task]
    regularizers = [{"name": "sparse_l1", "weight": 0.2}]
    return resolved(y=labels, model={"regularizers": regularizers, "head": head}, finetune=finetune)


@pytest.mark.parametrize("task", TASKS)
def test_the_joint_gradient_is_the_sum_of_both_sides(task):
    """l_Y + alpha (l_X + penalties): by hand, and the gradients of end-to-end and pretraining on the same rows."""
    alpha, y = 0.3, TASKS[task][2]
    found, batch = recipe_for(task, alpha=alpha), batch_of(slice(None), y)
    joint = gradients(one_step(found, "joint", batch, y=y).model)
    label_side = gradients(one_step(found, "end-to-end", batch, y=y).model)
    data_side = gradients(one_step(found, "pretrain", batch, y=y).model)
    assert_same(joint, summed(label_side, {name: alpha * g for name, g in data_side.items()}), atol=1e-12)
    by_label, by_data = by_hand(found, task)
    assert_same(joint, summed(by_label, {name: alpha * g for name, g in by_data.items()}), atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_alternating_steps_have_their_own_gradient_alone(task):
    """Step 0 that of l_X + penalties, step 1 that of l_Y: by hand, and nothing reaches the other side's parameters."""
    found, y = recipe_for(task), TASKS[task][2]
    batch = batch_of(slice(None), y)
    reconstruct = gradients(one_step(found, "alternate", batch, phase=0, y=y).model)
    classify = gradients(one_step(found, "alternate", batch, phase=1, y=y).model)
    by_label, by_data = by_hand(found, task)
    assert_same(reconstruct, by_data, atol=1e-12)
    assert_same(classify, by_label, atol=1e-12)
    assert not any(name.startswith("head.") for name in reconstruct)
    assert not any(name.startswith("decoder.") for name in classify)


def test_alternating_takes_turns_and_leaves_the_other_side_alone():
    """The decoder moves in even steps, the head in odd ones, the encoder in all; each phase keeps its own moments."""
    found = resolved(finetune={"optimizer": ADAMW})
    trainer = trainer_of(found, "alternate", feed_of(X, Y))
    for step in range(4):
        before = weights(trainer.model)
        phase, k = trainer.plan.at(step)
        assert (phase, k) == (step % 2, step // 2)
        trainer.make_step(trainer.runs[phase], [batch_of(slice(None))])
        moved = {name.split(".")[0] for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == ({"encoder", "decoder"} if phase == 0 else {"encoder", "head"})


def test_modes_compare_at_equal_steps():
    """ceil(2 epochs * 29 rows / 8) = 8 steps; alternating makes so many of each of its two."""
    steps = {mode: trainer_of(resolved(), mode, feed_of(X, Y)).plan.steps for mode in ("joint", "end-to-end", "alternate")}
    assert steps == {"joint": 8, "end-to-end": 8, "alternate": 16}


def test_phases_in_sequence_end_with_a_whole_epoch():
    """Two phases of 3 epochs over 10 rows by 4: ceil(7.5) = 8 steps each, epochs after 3, 5, 8 of each."""
    phase = dataclasses.replace(trainer_of(resolved(), "joint", feed_of(X, Y)).runs[0].phase, epochs=3)
    plan = Plan((phase, phase), rows=10, batch=4)
    assert [plan.epoch_end(epoch) for epoch in range(1, 7)] == [3, 5, 8, 11, 13, 16]
    assert plan.steps == 16
    assert [plan.at(step) for step in (0, 7, 8, 15)] == [(0, 0), (0, 7), (1, 0), (1, 7)]


def test_phases_may_make_different_numbers_of_passes():
    """One epoch and then two, over 10 rows by 4: ceil(2.5) = 3 and ceil(5) = 5 steps; the epochs end after 3, 3 + 3, 3 + 5."""
    first = dataclasses.replace(trainer_of(resolved(), "joint", feed_of(X, Y)).runs[0].phase, epochs=1)
    second = dataclasses.replace(first, epochs=2)
    plan = Plan((first, second), rows=10, batch=4)
    assert (plan.epochs, plan.steps) == (3, 8)
    assert [plan.epoch_end(epoch) for epoch in (1, 2, 3)] == [3, 6, 8]
    assert [plan.at(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (1, 4)]
    assert [plan.ending(epoch) for epoch in (1, 2, 3)] == [(first,), (second,), (second,)]


# --- alpha = 0


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"regularizers": [{"name": "weights", "weight": 0.05}]},
        {"encoder": DIAG, "regularizers": [{"name": "kl", "weight": 2.0}, {"name": "weights", "weight": 0.05, "norm": "l1"}]},
    ],
    ids=["plain", "weights", "kl and weights"],
)
def test_joint_with_alpha_zero_is_labels_only(model):
    """The same labelled rows among unlabelled ones and alone: encoder and head agree to 1e-12 after six AdamW steps."""
    found = resolved(model=model, extra=[(MeanCode, 0.5)], finetune={"alpha": 0.0, "optimizer": ADAMW})
    labeled, unlabeled = np.nonzero(Y >= 0)[0], np.nonzero(Y < 0)[0]
    joint, alone = trainer_of(found, "joint", feed_of(X, Y)), trainer_of(found, "end-to-end", feed_of(X, Y))
    for step in range(6):
        pick = labeled[np.arange(step, step + 5) % len(labeled)]
        rest = unlabeled[np.arange(step, step + 9) % len(unlabeled)]
        joint.make_step(joint.runs[0], [batch_of(np.concatenate([rest[:4], pick, rest[4:]]))])
        alone.make_step(alone.runs[0], [batch_of(pick)])
    start = weights(fresh(found))
    for side in ("encoder.", "head."):
        expected = {name: value for name, value in weights(alone.model).items() if name.startswith(side)}
        assert_same({name: weights(joint.model)[name] for name in expected}, expected, atol=1e-12)
        assert any(not torch.equal(value, start[name]) for name, value in expected.items())


# --- extra labelled rows


def expected_gradient(found, uniform, labeled):
    """Exact expectation of the reconstruction side's gradient over every draw of so many rows from 4 rows and from 2 labels."""
    model = fresh(found)
    trainer = trainer_of(found, "joint", feed_of(X[:4], Y[:4]), model)
    objective = dataclasses.replace(trainer.runs[0].phase.objective, terms=trainer.runs[0].phase.objective.of_data.terms[1:])
    x, y = torch.from_numpy(X[:4]), torch.tensor([0, -1, 2, -1])
    total, draws = {}, list(product(product(range(4), repeat=uniform), product((0, 2), repeat=labeled)))
    for drawn, extra in draws:
        pick = torch.tensor([*drawn, *extra])
        batch = Batch(x=x[pick], y=y[pick], uniform=torch.arange(len(pick)) < uniform)
        model.zero_grad()
        objective.weigh(objective.shares(model(batch, objective.needs), count_rows([batch])), torch.tensor(0)).backward()
        total = summed(total, gradients(model))
    return {name: value / len(draws) for name, value in total.items()}


def test_the_expected_gradient_of_l_x_does_not_depend_on_extra_labels():
    found = resolved(model={"regularizers": [{"name": "sparse_l1", "weight": 0.5}]}, finetune={"alpha": 0.7})
    whole = Batch(x=torch.from_numpy(X[:4]))
    model = fresh(found)
    trace = model(whole, frozenset({"reconstruction"}))
    value = 0.5 * (whole.x - trace.p_x.mean).square().sum(1).mean() + 0.5 * trace.q.mean.abs().sum(1).mean()
    (0.7 * value).backward()
    truth = gradients(model)  # of the mean over all rows, by the bare formula
    for uniform, labeled in ((3, 0), (2, 1), (1, 2)):
        found_gradient = expected_gradient(found, uniform, labeled)
        assert_same({name: found_gradient[name] for name in truth}, truth, atol=1e-12)


def test_extra_rows_enter_l_y_alone():
    """The reconstruction share of a batch is that of its uniform rows; the supervised one counts every labelled row."""
    found = resolved()
    whole = batch_of(slice(None))
    uniform = torch.arange(29) < 20
    whole = dataclasses.replace(whole, uniform=uniform)
    trainer = one_step(found, "joint", whole)
    shares = dict(zip(trainer.runs[0].terms, trainer.runs[0].shares.tolist(), strict=True))
    model = fresh(found)
    trace = model(whole, frozenset({"reconstruction", "prediction"}))
    expected = -trace.p_x.log_prob(whole.x)[:20].mean()
    assert shares["reconstruction"] == pytest.approx(float(expected.detach()), rel=1e-6)
    known = whole.y >= 0
    nll = torch.nn.functional.cross_entropy(trace.p_y.logits[known], whole.y[known])
    assert shares["supervised"] == pytest.approx(float(nll.detach()), rel=1e-6)


def test_a_joint_draw_has_its_fraction_of_extra_labels():
    """labeled_fraction 0.25 of 8 rows: 6 uniform and 2 extra; labels-only draws nothing else."""
    found = resolved(finetune={"labeled_fraction": 0.25})
    assert trainer_of(found, "joint", feed_of(X, Y)).runs[0].phase.draw == Draw(6, 2)
    assert trainer_of(found, "end-to-end", feed_of(X, Y)).runs[0].phase.draw == Draw(0, 8)
    (batch,) = feed_of(X, Y).batches([(Draw(6, 2), 3)])
    assert batch.uniform.tolist() == [True] * 6 + [False] * 2
    assert batch.labeled[6:].all()


def test_the_supervised_term_alone_needs_no_decoder():
    assert SUPERVISED.needs == {"prediction"}
    found = resolved()
    trainer = one_step(found, "end-to-end", cut(batch_of(slice(None)), [range(9)])[0])
    assert trainer.model.decoder.linear.weight.grad is None
