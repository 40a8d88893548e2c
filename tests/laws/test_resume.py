"""A run that was killed and resumed has the same bits as one that was not: everything a recipe can switch on at once."""

import numpy as np
import pytest
import torch
from engine_kit import CPU, assert_same, fresh, resolved, rows, trainer_of, weights

from ssl_ae.checkpoint import load_checkpoint, save_checkpoint
from ssl_ae.data.loading import Feed
from ssl_ae.errors import Stopped
from ssl_ae.training import Trainer

X, Y = rows(29, labeled=0.4)
X = X.astype(np.float32)
DIAG = {"name": "mlp", "widths": [11], "posterior": "diag", "batch_norm": True}
NOISES = [
    {"name": "gaussian_noise"},
    {"name": "masking_noise", "layers": ["h1"]},
    {"name": "dropout"},
    {"name": "kl", "weight": 0.1, "warmup_steps": 7},
    {"name": "weights", "weight": 1e-3},
]


class OnDisk:
    """A split of four blocks, for streaming."""

    rows, row_bytes = len(X), X[0].nbytes
    block_starts = np.array([0, 7, 13, 20])

    def read(self, rows):
        return X[rows]


def feed(residency="resident"):
    return Feed(OnDisk(), Y, lambda stored: stored, seed=3, device=CPU, residency=residency)


def trainer(mode, residency="resident", **training):
    options = {
        "epochs": 3,
        "batch_size": 8,
        "micro_batches": 2,
        "optimizer": {"name": "sgd", "lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "clip_norm": 5.0,
        "ema": 0.9,
        "log_every": 4,
        **training,
    }
    model = {"encoder": DIAG, "samples": 2, "regularizers": NOISES}
    found = resolved(model=model, pretrain=options, finetune=options | {"alpha": 0.1, "labeled_fraction": 0.25})
    return trainer_of(found, mode, feed(residency), fresh(found, dtype=torch.float32))


def outcome(finished: Trainer):
    progress = {name: value for name, value in vars(finished.progress).items() if name != "seconds"}
    return weights(finished.model), weights(finished.result), progress


def stop_after(some: Trainer, steps: int, monkeypatch):
    """As SIGTERM does: the flag is up after so many steps, the trainer saves and leaves."""
    monkeypatch.setattr("ssl_ae.distributed.Agreement.asked", lambda self, here, step: step == steps)


def killed_and_resumed(make, steps, folder, monkeypatch):
    first = make()
    first.save = lambda checkpoint: save_checkpoint(folder, checkpoint)
    with monkeypatch.context() as patch:
        stop_after(first, steps, patch)
        with pytest.raises(Stopped, match=f"stopped after step {steps} of {first.plan.steps}"):
            first.run()
    torch.manual_seed(99)  # a new process has other random numbers
    second, warnings = make(), []
    with torch.no_grad():
        for p in second.model.parameters():
            p.zero_()
    second.restore(load_checkpoint(folder, warnings))
    assert not warnings
    assert second.progress.step == steps
    second.run()
    return outcome(second)


def assert_same_outcome(found, expected):
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_same(a, b)
    assert found[2] == expected[2]


@pytest.mark.parametrize("mode", ["pretrain", "joint", "alternate", "end-to-end"])
@pytest.mark.parametrize("steps", [1, 4, 6, 9], ids=lambda n: f"after {n}")
def test_resumed_equals_uninterrupted(mode, steps, tmp_path, monkeypatch):
    """29 rows by 8: epochs end after 4, 8 and 11 steps, so 1, 6 and 9 lie within one."""
    whole = trainer(mode)
    whole.run()
    assert_same_outcome(killed_and_resumed(lambda: trainer(mode), steps, tmp_path, monkeypatch), outcome(whole))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_moments_go_on(optimizer, tmp_path, monkeypatch):
    options = {"optimizer": {"name": optimizer, "lr": 1e-2, "weight_decay": 1e-2}}
    whole = trainer("joint", **options)
    whole.run()
    assert_same_outcome(killed_and_resumed(lambda: trainer("joint", **options), 6, tmp_path, monkeypatch), outcome(whole))


def test_streaming_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_ae.data.order.WINDOW_ROWS", 11)  # so that 29 rows are shuffled along their blocks
    whole = trainer("joint", "stream")
    whole.run()
    assert_same_outcome(killed_and_resumed(lambda: trainer("joint", "stream"), 6, tmp_path, monkeypatch), outcome(whole))


def test_the_order_does_not_depend_on_where_the_rows_lie(monkeypatch):
    """Ranks and resumed runs may find other free memory; what they draw must be the same, within one window and beyond it."""
    for window in (11, 64):
        monkeypatch.setattr("ssl_ae.data.order.WINDOW_ROWS", window)
        resident, streamed = feed("resident").uniform_order, feed("stream").uniform_order
        taken = resident.take(0, 58)  # two passes over 29 rows
        assert np.array_equal(taken, streamed.take(0, 58))
        assert np.array_equal(np.sort(taken[:29]), np.arange(29))
        assert np.array_equal(np.sort(taken[29:]), np.arange(29))


def test_a_seed_is_a_run(tmp_path):
    """Twice the same bits without any interruption, whatever the generator held before; another seed differs."""
    results = []
    for disturbance, seed in ((1, 5), (2, 5), (1, 6)):
        each = trainer("joint")
        each.stepper.seed = seed
        torch.manual_seed(disturbance)
        each.run()
        results.append(weights(each.model))
    assert_same(results[1], results[0])
    assert any(not torch.equal(value, results[0][name]) for name, value in results[2].items())


def test_early_stopping_holds_after_a_kill(tmp_path):
    """Killed between the last checkpoint and the end of the stage: the resumed run must not train one epoch more."""

    def make():
        each = trainer("joint", epochs=9, early_stopping={"metric": "val/loss", "patience": 2})
        each.validate = lambda model, objective: {"loss": 1.0}
        return each

    whole = make()
    whole.save = lambda checkpoint: save_checkpoint(tmp_path, checkpoint)
    whole.run()
    assert whole.progress.epoch == 3  # the first is the best, and two more do not improve on it
    again = make()
    again.restore(load_checkpoint(tmp_path, []))
    again.run()
    assert_same_outcome(outcome(again), outcome(whole))


def test_early_stopping_keeps_the_weights_of_the_best_epoch(tmp_path):
    """Validation says 3, 1, 2, 2: the second epoch is the best, and its weights are what remains, also after a kill."""

    def make(losses):
        each = trainer("joint", epochs=9, early_stopping={"metric": "val/loss", "patience": 2})
        each.validate = lambda model, objective: {"loss": losses.pop(0)}
        return each

    best = []
    whole = make([3.0, 1.0, 2.0, 2.0])
    whole.save = lambda checkpoint: (save_checkpoint(tmp_path, checkpoint), best.append(weights(whole.result)))
    whole.run()
    assert_same(weights(whole.result), best[1])
    assert any(not torch.equal(value, best[3][name]) for name, value in best[1].items())
    again = make([])
    again.restore(load_checkpoint(tmp_path, []))
    again.run()
    assert_same(weights(again.result), best[1])


def test_a_first_epoch_that_is_not_a_number_is_no_record(tmp_path):
    losses = [float("nan"), 2.0, 1.0, 3.0, 3.0]
    some = trainer("joint", epochs=9, early_stopping={"metric": "val/loss", "patience": 2})
    some.validate = lambda model, objective: {"loss": losses.pop(0)}
    some.run()
    assert (some.progress.best, some.progress.best_epoch) == (1.0, 3)


def test_a_metric_that_was_not_a_number_stays_one(tmp_path):
    some = trainer("joint", epochs=1)
    some.validate = lambda model, objective: {"loss": float("nan")}
    some.save = lambda checkpoint: save_checkpoint(tmp_path, checkpoint)
    some.run()
    again = trainer("joint", epochs=1)
    again.restore(load_checkpoint(tmp_path, []))
    assert np.isnan(again.progress.history[-1]["val/loss"])
