"""Pseudo-labels: the weighted cross-entropy with an earlier model's guesses, and which rows it counts."""

import math

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, plan_of, resolved, rows
from ssl_ae_builtins.pseudo_labels import PseudoLabels

import ssl_ae
from ssl_ae.plan import passes

GUESS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 0.0, 0.0], [0.2, 0.7, 0.1]], dtype=torch.float64)
Y = torch.tensor([-1, -1, -1, 2])


def traced(extra_options):
    found = resolved(extra=[(PseudoLabels, 1.0, extra_options)])
    model = fresh(found).eval()
    batch = ssl_ae.Batch(x=torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), y=Y, guess=GUESS)
    regularizer = model.regularizers[-1]
    return regularizer, model(batch, regularizer.needs)


@pytest.mark.parametrize(("power", "sure"), [(1.0, 0.0), (2.0, 1.0), (3.0, 2.0)])
def test_the_penalty_is_the_cross_entropy_with_the_sharpened_guess(power, sure):
    """Number by number, in Python's own arithmetic."""
    regularizer, trace = traced({"power": power, "sure": sure})
    found = regularizer.penalty(trace).tolist()
    p = trace.p_y.probs.tolist()
    for row in (0, 1):
        guess = GUESS[row].tolist()
        raised = [g**power for g in guess]
        expected = max(guess) ** sure * -sum(r / sum(raised) * math.log(q) for r, q in zip(raised, p[row], strict=True))
        assert found[row] == pytest.approx(expected, rel=1e-12)
    assert found[2] == 0  # nobody has guessed
    assert found[3] == 0  # it has a label


def test_a_network_that_says_what_was_guessed_has_no_gradient():
    """sum_c g_c log p_c is largest at p = g (Gibbs' inequality), so its gradient by the logits is p - g = 0 there."""
    logits = GUESS[:2].log().requires_grad_()
    p_y = torch.distributions.Categorical(logits=logits, validate_args=False)
    trace = ssl_ae.Trace(model=None, batch=ssl_ae.Batch(x=torch.zeros(2, 7), guess=GUESS[:2]), p_y=p_y)
    PseudoLabels(PseudoLabels.Config(power=1.0, sure=0.0), ssl_ae.Shapes((7,), 5, 3)).penalty(trace).sum().backward()
    assert logits.grad.abs().max() < 1e-15


def test_a_large_power_takes_the_most_probable_class():
    regularizer, trace = traced({"power": 200.0, "sure": 0.0})
    assert regularizer.penalty(trace)[:2].tolist() == pytest.approx(
        [-trace.p_y.logits[0, 0].item(), -trace.p_y.logits[1, 2].item()]
    )


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_guesses_come_with_their_rows(residency):
    x, y = rows(count=29, labeled=0.5)
    guess = np.random.default_rng(1).dirichlet(np.ones(3), 29)
    found = resolved(finetune={"mode": "joint", "labeled_fraction": 0.25})
    feed = feed_of(x, y, guess=guess, residency=residency)
    draw = plan_of(found, fresh(found), "joint", feed).phases[0].draw
    for batch in feed.batches((draw, k) for k in range(7)):
        assert torch.equal(batch.guess, torch.as_tensor(guess, dtype=torch.float32)[batch.row])


def test_validation_rows_have_no_guess():
    regularizer, trace = traced({})
    batch = ssl_ae.Batch(x=torch.zeros(5, 7, dtype=torch.float64))
    assert trace.model(batch, regularizer.needs).batch.guess.eq(0).all()


@pytest.mark.parametrize(
    ("epochs", "least", "expected"),
    [
        (2, 0, 2),
        (2, 7, 3),
        (2, 6, 2),
        (1, 100, 35),
    ],  # 23 rows in batches of 8: two passes are 5.75 steps, made in 6; 100 take 34.8
)
def test_small_data_are_passed_over_until_enough_steps_are_made(epochs, least, expected):
    found = resolved(pretrain={"epochs": epochs, "min_steps": least})
    plan = plan_of(found, fresh(found, head=False), "pretrain", feed_of(*rows()))
    assert passes(found.recipe.pretrain, 23, 8) == plan.epochs == expected
    assert plan.steps >= least
