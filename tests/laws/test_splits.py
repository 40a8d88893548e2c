"""The row law and the splits: a step is a function of its rows alone, however they are cut into micro-batches."""

import dataclasses

import pytest
import torch
from engine_kit import Contraction, MeanCode, assert_same, cut, feed_of, fresh, gradients, resolved, rows, trainer_of, weights

from ssl_ae.components import Regularizer
from ssl_ae.objective import count_rows
from ssl_ae.trace import Batch, Need, Over
from ssl_ae.training import micro_batches

EVERYTHING = {
    "model": {"regularizers": [{"name": "weights", "weight": 0.02}, {"name": "sparse_l1", "weight": 0.3}]},
    "extra": [(MeanCode, 0.7), (Contraction, 0.05)],
    "finetune": {"alpha": 0.4},
}


def batch_of(count=23, labeled=0.4):
    """Rows of which some are extra labelled ones, as in a joint draw."""
    x, y = rows(count, labeled=labeled)
    uniform = torch.ones(count, dtype=torch.bool)
    uniform[torch.nonzero(torch.from_numpy(y) >= 0)[:3, 0]] = False
    weight = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return Batch(x=torch.from_numpy(x), y=torch.from_numpy(y), uniform=uniform, weight_y=weight)


def stepped(parts, mode="joint", found=None):
    found = found or resolved(**EVERYTHING)
    x, y = rows(23, labeled=0.4)
    trainer = trainer_of(found, mode, feed_of(x, y))
    trainer.make_step(trainer.runs[0], parts)
    return trainer


# --- row law


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_rows_does_not_matter(order):
    whole = batch_of()
    turned = torch.arange(22, -1, -1) if order == "reversed" else torch.randperm(23, generator=torch.Generator().manual_seed(2))
    a, b = stepped([whole]), stepped(cut(whole, [turned]))
    assert_same(gradients(b.model), gradients(a.model), atol=1e-12)


def test_a_row_has_its_value_in_any_company():
    """Every ROWS and LABELED term of the joint objective, row by row alone, against the same rows together."""
    trainer = stepped([batch_of()])
    objective, model, whole = trainer.runs[0].phase.objective.of_data, trainer.model, batch_of()
    by_row = [term for term in objective.terms if term.over in (Over.ROWS, Over.LABELED)]
    assert {term.name for term in by_row} == {"supervised", "reconstruction", "sparse_l1", "contraction"}
    needs = frozenset().union(*(term.needs for term in by_row))
    together = model(whole, needs)
    for i, alone in enumerate(cut(whole, [[i] for i in range(len(whole))])):
        trace = model(alone, needs)
        for term in by_row:
            torch.testing.assert_close(term.of(trace)[0], term.of(together)[i], rtol=1e-10, atol=1e-12)


def test_the_objective_is_the_weighted_sum_of_row_means_by_hand():
    """l_Y over labelled rows + alpha (l_X + penalties over uniform rows) + penalties of the model, from the terms' own rows."""
    whole, found = batch_of(), resolved(**EVERYTHING)
    trainer = stepped([whole], found=found)
    shares = dict(zip(trainer.runs[0].terms, trainer.runs[0].shares, strict=True))
    trace = fresh(found)(whole, trainer.runs[0].phase.objective.of_data.needs, lambda value, uniform: value[uniform].mean(0))
    terms = {term.name: term for term in trainer.runs[0].phase.objective.terms}
    expected = {
        "supervised": terms["supervised"].of(trace)[whole.labeled].mean(),
        "reconstruction": terms["reconstruction"].of(trace)[whole.uniform].mean(),
        "sparse_l1": terms["sparse_l1"].of(trace)[whole.uniform].mean(),
        "contraction": terms["contraction"].of(trace)[whole.uniform].mean(),
        "mean_code": terms["mean_code"].of(trace),
        "weights": terms["weights"].of(trace),
    }
    assert shares.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(shares[name].double(), value.detach(), rtol=1e-6, atol=0)  # sums are kept in float32
    factors = {name: term.weight.value for name, term in terms.items()}
    assert factors == pytest.approx(
        {
            "supervised": 1,
            "reconstruction": 0.4,
            "sparse_l1": 0.4 * 0.3,
            "contraction": 0.4 * 0.05,
            "mean_code": 0.4 * 0.7,
            "weights": 0.02,
        }
    )


# --- micro-batches


GROUPS = {
    "2 even": [range(12), range(12, 23)],
    "4 uneven": [[0], range(1, 4), range(4, 20), range(20, 23)],
    "one row each": [[i] for i in range(23)],
}


@pytest.mark.parametrize("mode", ["pretrain", "joint", "end-to-end"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_one_part_equals_many(mode, groups):
    whole = batch_of()
    a, b = stepped([whole], mode), stepped(cut(whole, groups), mode)
    assert_same(gradients(b.model), gradients(a.model), atol=1e-10)
    assert_same(weights(b.model), weights(a.model), atol=1e-10)
    torch.testing.assert_close(b.runs[0].shares, a.runs[0].shares, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("who", ["none", "first group alone"])
def test_labels_may_fall_anywhere(who):
    """All labels in one part, or none at all: the parts without give 0, not nan."""
    whole = batch_of()
    labeled = torch.zeros(23, dtype=torch.bool)
    if who != "none":
        labeled[:2] = True
    whole = dataclasses.replace(whole, labeled=labeled, y=torch.where(labeled, 1, -1))
    a, b = stepped([whole]), stepped(cut(whole, [range(5), range(5, 23)]))
    assert_same(gradients(b.model), gradients(a.model), atol=1e-10)
    assert all(torch.isfinite(g).all() for g in gradients(b.model).values())


@pytest.mark.parametrize("micro", [2, 4, 7])
def test_a_whole_run_in_micro_batches(micro):
    """The recipe's own cut (every n-th row), AdamW, five steps over a joint draw, to 1e-10."""
    x, y = rows(29, labeled=0.4)

    def run(count):
        training = {"alpha": 0.4, "micro_batches": count, "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}}
        trainer = trainer_of(resolved(**EVERYTHING | {"finetune": training}), "joint", feed_of(x, y))
        trainer.run()
        return weights(trainer.model)

    assert_same(run(micro), run(1), atol=1e-10)


def test_micro_batches_keep_every_row_once():
    whole = batch_of()
    parts = micro_batches(whole, 4)
    assert sorted(torch.cat([part.row for part in parts]).tolist()) == list(range(23))
    assert {over: int(n) for over, n in count_rows(parts).items()} == {
        over: int(n) if over is not Over.STEP else 4 for over, n in count_rows([whole]).items()
    }
    assert [len(part) for part in micro_batches(cut(whole, [[0, 1]])[0], 4)] == [1, 1]


def test_a_rank_without_rows_still_takes_part():
    empty = cut(batch_of(), [[]])[0]
    assert [len(part) for part in micro_batches(empty, 4)] == [0]
    trainer = stepped([empty], "end-to-end")  # as where there are fewer labels than ranks
    assert all(torch.isfinite(g).all() for g in gradients(trainer.model).values())


def test_means_over_parts_are_of_the_noise_that_the_terms_see():
    """The pass that collects means runs no decoder, so it draws less noise than the pass that counts."""
    seen = []

    class Seen(Regularizer):
        name, over, needs = "seen", Over.STEP, frozenset({Need.STEP_MEAN})

        def penalty(self, trace):
            seen.append((trace.step_mean(trace.q.mean).detach(), trace.q.mean.detach()))
            return trace.q.mean.sum() * 0

    noises = [{"name": "dropout"}, {"name": "gaussian_noise", "layers": ["d1"]}]
    x, _ = rows(23)
    trainer = trainer_of(resolved(model={"regularizers": noises}, extra=[(Seen,)]), "pretrain", feed_of(x))
    parts = cut(Batch(torch.from_numpy(x)), [range(8), range(8, 16), range(16, 23)])
    trainer.make_step(trainer.runs[0], parts)
    counted = seen[3:]  # after one collecting pass for each part
    expected = torch.cat([codes for _, codes in counted]).mean(0)
    assert len(counted) == 3
    for mean, _ in counted:
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-15)
