"""The loop: what stops it, what it skips, averages, clips, projects and reports."""

import math
import signal

import pytest
import torch
from engine_kit import SGD, Keep, assert_same, feed_of, fresh, gradients, judge, resolved, rows, trainer_of, weights

import ssl_ae
from ssl_ae import Batch, Need, Over
from ssl_ae.errors import NonFiniteError, RecipeError, Stopped
from ssl_ae.validation import validate

X, Y = rows(29, labeled=0.4)


def batch_of(count=8):
    return Batch(x=torch.from_numpy(X[:count]), y=torch.from_numpy(Y[:count]))


class Broken(ssl_ae.Regularizer):
    """Not a number at the steps it is told."""

    name = "broken"
    at: tuple[int, ...] = ()

    def penalty(self, trace):
        self.calls = getattr(self, "calls", -1) + 1
        return trace.q.mean.sum(1) * (math.nan if self.calls in self.at else 0.0)


def broken_at(steps, mode="pretrain", **training):
    found = resolved(extra=[(Broken,)], pretrain={"epochs": 9, **training}, finetune={"epochs": 9, **training})
    trainer = trainer_of(found, mode, feed_of(X, Y), listener=Keep())
    trainer.model.regularizers[0].at = tuple(steps)
    return trainer


# --- steps that are not finite


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_step_changes_no_bit(name, bad):
    trainer = broken_at([bad], optimizer={"name": name, "lr": 0.1, "weight_decay": 0.1})
    for step in range(5):
        before = weights(trainer.model)
        trainer.make_step(trainer.runs[0], [batch_of()])
        moved = any(not torch.equal(value, before[key]) for key, value in weights(trainer.model).items())
        assert moved == (step != bad)
    assert int(trainer.runs[0].watch.skipped) == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    trainer = broken_at([1, 2, 6], log_every=4)
    trainer.run()
    readings = [values for _, values in trainer.listener.measures]
    assert [values["train/skipped_steps"] for values in readings][:2] == [2.0, 3.0]
    assert all(math.isfinite(value) for values in readings for value in values.values())


def test_nine_in_a_row_pass():
    trainer = broken_at(range(3, 12))
    trainer.run()
    assert int(trainer.runs[0].watch.skipped) == 9


def test_ten_in_a_row_stop_with_step_phase_and_suspect():
    saved = []
    trainer = broken_at(range(3, 99), log_every=5)
    trainer.save = saved.append
    with pytest.raises(
        NonFiniteError, match=r"step 12, phase 'pretrain': 10 steps in a row .* first suspect: term 'broken'"
    ) as error:
        trainer.run()
    assert error.value.exit_code == 1
    assert [checkpoint.progress["epoch"] for checkpoint in saved] == [
        1,
        2,
        3,
    ]  # after 4, 8 and 11 steps; none of a run that is lost
    assert all(torch.isfinite(value).all() for value in saved[-1].weights.values())


def test_nan_in_the_data_has_a_suspect_too():
    x = X.copy()
    x[:] = math.nan
    trainer = trainer_of(resolved(pretrain={"epochs": 5}), "pretrain", feed_of(x))
    with pytest.raises(NonFiniteError, match="first suspect: term 'reconstruction'"):
        trainer.run()


def test_one_broken_phase_of_two_stops_under_its_own_name():
    """The classifier's steps between are fine; ten bad ones of the reconstruction in a row are enough. Steps 0, 2, ..., 18."""
    trainer = broken_at(range(99), mode="alternate")
    with pytest.raises(NonFiniteError, match=r"step 18, phase 'reconstruct': .* first suspect: term 'broken'"):
        trainer.run()


# --- early stopping


def stopping(metrics, metric="val/loss", patience=2):
    early = {"metric": metric, "patience": patience}
    trainer = trainer_of(resolved(pretrain={"epochs": 9, "early_stopping": early}), "pretrain", feed_of(X))
    values, trainer.kept = iter(metrics), []

    def validate_so(model, objective):
        trainer.kept.append(weights(model))
        return {metric.removeprefix("val/"): next(values)}

    trainer.validate = validate_so
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("metric", "values", "epochs", "best"),
    [
        ("val/loss", [5, 4, 4.5, 4.1], 4, 2),
        ("val/loss", [5, 6, 4, 7, 3, 8, 9], 7, 5),
        ("val/accuracy", [0.5, 0.6, 0.6, 0.59], 4, 2),
        ("val/loss", [9, 8, 7, 6, 5, 4, 3, 2, 1], 9, 9),
    ],
)
def test_early_stopping_waits_for_its_patience_and_keeps_the_best(metric, values, epochs, best):
    trainer = stopping(values, metric)
    assert (trainer.progress.epoch, trainer.progress.best_epoch) == (epochs, best)
    assert_same(weights(trainer.result), trainer.kept[best - 1])


def test_a_metric_that_is_not_measured_has_a_near_match():
    trainer = trainer_of(resolved(pretrain={"early_stopping": {"metric": "val/los"}}), "pretrain", feed_of(X))
    trainer.validate = lambda model, objective: {"loss": 1.0}
    with pytest.raises(RecipeError, match=r"metric = val/los: this stage measures val/loss. Did you mean val/loss\?"):
        trainer.run()


# --- averages, clipping, projection, precision


def test_the_average_is_its_formula():
    """a_1 = w_1, then a_t = d a_(t-1) + (1 - d) w_t: bias-free, because it starts at the first weights."""
    decay = 0.8
    trainer = trainer_of(resolved(pretrain={"ema": decay}), "pretrain", feed_of(X))
    average = None
    for _ in range(6):
        trainer.make_step(trainer.runs[0], [batch_of()])
        now = weights(trainer.model)
        average = now if average is None else {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    assert trainer.result is trainer.stepper.average.module
    assert_same(weights(trainer.result), average, atol=1e-12)


@pytest.mark.parametrize("norm", [0.01, 1e9])
def test_clipping_is_torchs(norm):
    ours, plain = (trainer_of(resolved(pretrain={"clip_norm": c}), "pretrain", feed_of(X)) for c in (norm, None))
    for trainer in (ours, plain):
        trainer.make_step(trainer.runs[0], [batch_of()])
    torch.nn.utils.clip_grad_norm_(plain.runs[0].parameters, norm)
    assert_same(gradients(ours.model), gradients(plain.model), atol=1e-12)


class UnitColumns(ssl_ae.Regularizer):
    name = "unit_columns"

    def project(self, model):
        weight = model.decoder.linear.weight
        assert not torch.is_grad_enabled()
        weight.div_(weight.norm(dim=0))


def test_projections_hold_after_every_step():
    trainer = trainer_of(resolved(extra=[(UnitColumns,)]), "pretrain", feed_of(X))
    for _ in range(3):
        trainer.make_step(trainer.runs[0], [batch_of()])
        norms = trainer.model.decoder.linear.weight.detach().norm(dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


class Flip(ssl_ae.Regularizer):
    """Negates random rows: x and what it is compared with."""

    name = "flip"

    def transform(self, batch, generator):
        sign = torch.randint(2, (len(batch), 1), generator=generator) * 2.0 - 1.0
        return Batch(**{**vars(batch), "x": batch.x * sign, "target": batch.x * sign})


def test_transforms_come_first_and_are_the_steps_own():
    trainer = trainer_of(resolved(extra=[(Flip,)]), "pretrain", feed_of(X))
    seen = []
    trainer.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    for step in (0, 1, 0):
        trainer.progress.step = step
        trainer.make_step(trainer.runs[0], [batch_of()])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0].abs(), batch_of().x.abs())


@pytest.mark.parametrize("mode", ["pretrain", "joint", "alternate"])
def test_bf16_trains(mode):
    """Weights stay float32 and finite, and l_X falls as it does in float32, within a tenth."""
    encoder = {"name": "mlp", "widths": [11], "posterior": "diag"}
    options = {"epochs": 20, "optimizer": {"name": "adamw", "lr": 1e-2}, "log_every": 1000}
    found = resolved(model={"encoder": encoder, "regularizers": [{"name": "kl"}]}, pretrain=options, finetune=options)
    last = []
    for bf16 in (True, False):
        trainer = trainer_of(found, mode, feed_of(X, Y, dtype=torch.float32), fresh(found, dtype=torch.float32), bf16=bf16)
        trainer.run()
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trainer.model.parameters())
        last.append(validate(trainer.model, trainer.runs[0].phase.objective, feed_of(X, Y, dtype=torch.float32)))
    assert last[0]["reconstruction"] == pytest.approx(last[1]["reconstruction"], rel=0.1)


# --- what is reported


def test_readings_are_means_since_the_last_one():
    """lr 1e-300 keeps the weights: each reading is the mean of its steps' values, taken again from the same batches."""
    found = resolved(pretrain={"optimizer": {**SGD, "lr": 1e-300}, "log_every": 3, "epochs": 2})
    listener, feed = Keep(), feed_of(X)
    trainer = trainer_of(found, "pretrain", feed, listener=listener)
    trainer.run()
    assert [step for step, _ in listener.measures] == [3, 4, 6, 8]  # every third, and the ends of epochs: 29 rows by 8
    model, run = fresh(found), trainer.runs[0]
    each = []
    for batch in feed.batches((run.phase.draw, k) for k in range(8)):
        trace = model(batch, frozenset({Need.RECONSTRUCTION}))
        each.append(float(-trace.p_x.log_prob(batch.x).mean().detach()))
    expected = [sum(each[:3]) / 3, each[3], sum(each[4:6]) / 2, sum(each[6:]) / 2]
    assert [values["train/reconstruction"] for _, values in listener.measures] == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_follows_the_schedule():
    """Linear from 0.1 over 8 steps, with a reading after each: the rate of the step to come, 0.1 (1 - t / 8)."""
    found = resolved(pretrain={"schedule": {"name": "linear"}, "log_every": 1})
    trainer = trainer_of(found, "pretrain", feed_of(X), listener=Keep())
    trainer.run()
    rates = [values["train/lr"] for _, values in trainer.listener.measures]
    assert rates == pytest.approx([0.1 * (1 - t / 8) for t in range(1, 9)])


def test_epochs_end_where_their_rows_do():
    listener = Keep()
    trainer_of(resolved(pretrain={"epochs": 5}), "pretrain", feed_of(X), listener=listener).run()
    assert [(epoch, step) for epoch, step, _ in listener.epochs] == [(1, 4), (2, 8), (3, 11), (4, 15), (5, 19)]


def test_validation_is_the_mean_over_rows():
    """By hand on 1,500 rows, more than one batch of validation; the noise is off, the labelled rows alone count for l_Y."""
    x, y = rows(1500, labeled=0.3)
    found = resolved(
        model={"regularizers": [{"name": "gaussian_noise"}, {"name": "sparse_l1", "weight": 0.2}]}, finetune={"alpha": 0.5}
    )
    trainer = trainer_of(found, "joint", feed_of(X, Y))
    values = judge(trainer, feed_of(x, y))(trainer.model)
    model = trainer.model.eval()
    z = model.features(torch.from_numpy(x))
    p_x, p_y, known = model.decode(z), model.head(z), y >= 0
    l_x = -p_x.log_prob(torch.from_numpy(x)).mean()
    l_y = torch.nn.functional.cross_entropy(p_y.logits[known], torch.from_numpy(y[known]))
    sparse = z.abs().sum(1).mean()
    assert values == pytest.approx(
        {
            "reconstruction": float(l_x.detach()),
            "supervised": float(l_y.detach()),
            "sparse_l1": float(sparse.detach()),
            "loss": float((l_y + 0.5 * (l_x + 0.2 * sparse)).detach()),
            "mse": float((p_x.mean.detach() - torch.from_numpy(x)).square().mean()),
            "accuracy": float((p_y.logits.argmax(1).numpy() == y)[known].mean()),
        },
        rel=1e-9,
    )


def test_validation_leaves_the_model_and_the_generator_alone():
    encoder = {"name": "mlp", "widths": [11], "posterior": "diag", "batch_norm": True}
    trainer = trainer_of(resolved(model={"encoder": encoder}), "pretrain", feed_of(X))
    trainer.model.train()
    before, generator = weights(trainer.model), torch.get_rng_state()
    first, second = (judge(trainer, feed_of(X))(trainer.model) for _ in range(2))
    assert first == second  # the draws of z are fixed
    assert_same(weights(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainer.model.training


class Spread(ssl_ae.Regularizer):
    """Needs a mean over the step and the gradient of the input at once."""

    name, over = "spread", Over.STEP
    needs = frozenset({Need.STEP_MEAN, Need.INPUT_GRAD})

    def penalty(self, trace):
        slope = torch.autograd.grad(trace.q.mean.sum(), trace.batch.x, create_graph=True)[0]
        return trace.step_mean(slope.square().sum(1)).square()


def test_terms_may_need_several_things_at_once():
    found = resolved(extra=[(Spread,)], pretrain={"micro_batches": 2})
    trainer = trainer_of(found, "pretrain", feed_of(X))
    trainer.validate = judge(trainer, feed_of(X))
    trainer.run()
    assert math.isfinite(trainer.progress.history[-1]["val/spread"])


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(number):
    saved = []
    trainer = trainer_of(resolved(), "pretrain", feed_of(X), save=saved.append)
    trainer.listener.stepped = lambda step, count: signal.raise_signal(number) if step == 3 else None
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped after step 3 of 8; the place is saved") as error:
        trainer.run()
    assert error.value.exit_code == 75
    assert [checkpoint.progress["step"] for checkpoint in saved] == [3]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts_at_once():
    trainer = trainer_of(resolved(), "pretrain", feed_of(X))

    def twice(step, count):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.listener.stepped = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_batch_normalisation_of_one_row_is_refused():
    """The last part of three rows in two: torch's own words name neither the batch nor its parts."""
    encoder = {"name": "mlp", "widths": [11], "batch_norm": True}
    found = resolved(model={"encoder": encoder}, pretrain={"batch_size": 3, "micro_batches": 2})
    trainer = trainer_of(found, "pretrain", feed_of(*rows(9)))
    with pytest.raises(RecipeError, match=r"of 3 rows over 1 ranks in micro_batches = 2 a part has a single one"):
        trainer.run()
