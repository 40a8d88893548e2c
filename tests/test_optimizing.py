"""Optimizers against torch's plain loops, schedules by formula, and steps that are skipped to the bit."""

import copy
import math

import pytest
import torch

from ssl_ae.errors import NonFiniteError
from ssl_ae.optimizing import Watch, build_optimizer, build_schedule
from ssl_ae.recipe import Optimizer, Schedule

NAMES = pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(5))]


def gradients(step, ps):
    torch.manual_seed(100 + step)
    for p in ps:
        p.grad = torch.randn_like(p)


def options(name, **more):
    return Optimizer(name=name, **{"lr": 0.1, "weight_decay": 0.2, **more})


@NAMES
def test_fused_steps_are_torchs_plain_ones(name):
    """Matrices decay, biases do not; sgd and adam have L2 in the gradient, adamw decays apart (Loshchilov & Hutter 2019)."""
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(options(name), ours)
    groups = [{"params": theirs[:1], "weight_decay": 0.2}, {"params": theirs[1:], "weight_decay": 0.0}]
    plain = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, foreach=False),
        "adam": lambda: torch.optim.Adam(groups, lr=0.1, foreach=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False),
    }[name]()
    for step in range(5):
        gradients(step, ours)
        gradients(step, theirs)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def flat(value):
    """Every tensor and number of a state, in order."""
    if isinstance(value, dict):
        return [item for key in sorted(value, key=str) for item in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [item for each in value for item in flat(each)]
    return [value]


@NAMES
@pytest.mark.parametrize("bad", [{0}, {2}, {0, 1, 2}, {1, 3}], ids=str)
def test_a_skipped_step_never_was(name, bad):
    """Weights and state after steps of which some were skipped have the bits of a run that never met those."""
    met, spared = parameters(), parameters()
    optimizers = build_optimizer(options(name), met), build_optimizer(options(name), spared)
    for step in range(5):
        gradients(step, met)
        if step in bad:
            met[0].grad[1, 1] = math.nan
            before = copy.deepcopy([met, optimizers[0].state_dict()["state"]])
        optimizers[0].found_inf = torch.tensor(float(step in bad))
        optimizers[0].step()
        if step in bad:
            assert all(torch.equal(a, b) for a, b in zip(before[0], met, strict=True))
        else:
            gradients(step, spared)
            optimizers[1].found_inf = torch.zeros(())
            optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(met, spared, strict=True))
    a, b = (flat(optimizer.state_dict()["state"]) for optimizer in optimizers)
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_hand(momentum):
    """v <- momentum v + g, w <- w - lr v."""
    ours, w = parameters(), parameters()
    optimizer = build_optimizer(options("sgd", momentum=momentum, weight_decay=0.0), ours)
    v = [torch.zeros_like(p) for p in w]
    for step in range(4):
        gradients(step, ours)
        gradients(step, w)
        optimizer.step()
        v = [momentum * before + p.grad for before, p in zip(v, w, strict=True)]
        for p, velocity in zip(w, v, strict=True):
            p.data -= 0.1 * velocity
    for a, b in zip(ours, w, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- schedules


def rates(steps, **schedule):
    optimizer = build_optimizer(options("sgd"), parameters())
    found, plan = [], build_schedule(Schedule(**schedule), optimizer, steps)
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        plan.step()
    return found


def test_constant():
    assert rates(5, name="constant") == [1.0] * 5


def test_linear_falls_to_its_end():
    assert rates(4, name="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, name="linear", final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_a_wave():
    """final + (1 - final) (1 + cos(pi t / T)) / 2 (Loshchilov & Hutter 2017, eq. 5)."""
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert rates(10, name="cosine", final=0.1) == pytest.approx(expected)
    assert rates(10, name="cosine", final=0.1)[5] == pytest.approx(0.55)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_climbs_then_the_schedule_starts_whole(name):
    found = rates(9, name=name, warmup_steps=4)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[4:] == pytest.approx(rates(5, name=name))


def test_a_held_rate_falls_over_the_rest_of_the_steps():
    """The ladder's: the full rate for two thirds, then linear to 0 (Rasmus et al. 2015, sec. 4.1)."""
    assert rates(6, name="linear", hold=0.5) == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    assert rates(8, name="cosine", hold=0.5)[4:] == pytest.approx(rates(4, name="cosine"))
    assert rates(4, name="linear", hold=0.25, final=0.4) == pytest.approx([1, 1, 0.8, 0.6])  # 0.4 + 0.6 * (1, 2/3, 1/3)


def test_a_hold_counts_from_the_first_step_and_a_longer_warm_up_wins():
    assert rates(8, name="linear", hold=0.5, warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(9, name="linear", hold=0.25, warmup_steps=4) == pytest.approx(rates(9, name="linear", warmup_steps=4))


@pytest.mark.parametrize("hold", [-0.1, 1.0])
def test_a_hold_is_a_part_of_the_steps_that_leaves_some_to_fall(hold):
    with pytest.raises(ValueError, match="hold"):
        Schedule(hold=hold)


def test_a_warm_up_longer_than_the_run_only_climbs():
    assert rates(3, name="cosine", warmup_steps=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


# --- watch


def watched(found, limit=3, shares=(1.0, math.nan)):
    watch = Watch(limit, torch.device("cpu"))
    for step, bad in enumerate(found):
        watch.see(torch.tensor(bool(bad)), torch.tensor(shares if bad else (1.0, 1.0)), torch.tensor(step))
    return watch


def test_the_watch_counts_and_forgives():
    watch = watched([1, 1, 0, 1, 0, 1, 1])
    assert (int(watch.skipped), int(watch.in_a_row)) == (5, 2)
    watch.check("p", ["a", "b"], int(watch.suspect))


def test_the_watch_names_the_step_the_phase_and_the_first_suspect():
    watch = watched([0, 1, 1, 1, 0, 0])  # the third in a row is step 3; later good steps do not hide it
    assert int(watch.suspect) == 1
    with pytest.raises(NonFiniteError, match=r"step 3, phase 'p': 3 steps in a row .* first suspect: term 'b'"):
        watch.check("p", ["a", "b"], int(watch.suspect))


def test_the_watch_says_when_every_term_was_finite():
    watch = watched([1, 1, 1], shares=(1.0, 2.0))
    with pytest.raises(NonFiniteError, match="every term was finite, so the gradient itself overflowed"):
        watch.check("p", ["a", "b"], int(watch.suspect))


def test_the_suspect_is_of_the_first_bad_step():
    watch = Watch(3, torch.device("cpu"))
    for step, shares in enumerate([(math.inf, 1.0), (1.0, math.nan), (1.0, math.nan)]):
        watch.see(torch.tensor(True), torch.tensor(shares), torch.tensor(step))
    assert int(watch.suspect) == 0


def test_the_watch_goes_on_from_its_state():
    first, second = watched([1, 1]), Watch(3, torch.device("cpu"))
    second.load(first.state())
    second.see(torch.tensor(True), torch.tensor((1.0, math.nan)), torch.tensor(2))
    with pytest.raises(NonFiniteError, match="step 2"):
        second.check("p", ["a", "b"], 1)
