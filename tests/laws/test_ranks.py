"""Two ranks equal one: real processes, gloo and DistributedDataParallel through the real Trainer, in float64."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing
from engine_kit import CPU, Keep, MeanCode, assert_same, feed_of, fresh, gradients, judge, resolved, rows, trainer_of, weights

from ssl_ae import distributed
from ssl_ae.training import micro_batches

X, Y = rows(29, labeled=0.3)
WEIGHTS = {"name": "weights", "weight": 0.02}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}


def scenario(
    mode, optimizer=None, regularizers=(WEIGHTS, {"name": "sparse_l1", "weight": 0.3}), extra=((MeanCode, 0.7),), **training
):
    training = {"alpha": 0.4, "log_every": 1, "epochs": 2, **({"optimizer": optimizer} if optimizer else {}), **training}
    only_finetune = {"alpha", "labeled_fraction"}
    return mode, {
        "model": {"regularizers": list(regularizers)},
        "extra": extra,
        "pretrain": {name: value for name, value in training.items() if name not in only_finetune},
        "finetune": training,
    }


SCENARIOS = {
    "joint": scenario("joint"),
    "joint, AdamW, clipped, averaged": scenario("joint", ADAMW, clip_norm=0.5, ema=0.9),
    "alternate": scenario("alternate"),
    "end-to-end": scenario("end-to-end"),
    "pretrain": scenario("pretrain", extra=()),
    "joint, batches that two ranks cannot halve": scenario("joint", batch_size=11),
}


def train(name, micro):
    """Gradients of the first step; weights, readings and validation of a whole run; on this rank."""
    mode, sections = SCENARIOS[name]
    for stage in ("pretrain", "finetune"):
        sections = sections | {stage: sections[stage] | {"micro_batches": micro}}
    found = resolved(**sections)
    feed = feed_of(X, Y, rank=distributed.rank(), world=distributed.world())
    first = trainer_of(found, mode, feed)
    (batch,) = feed.batches([(first.runs[0].phase.draw, 0)])
    first.make_step(first.runs[0], micro_batches(batch, micro))
    listener = Keep()
    trainer = trainer_of(found, mode, feed, fresh(found), listener=listener)
    trainer.validate = judge(trainer, feed) if mode == "pretrain" else (lambda model: {})
    trainer.run()
    return {
        "gradients": gradients(first.model),
        "weights": weights(trainer.model),
        "kept": weights(trainer.result),
        "measures": listener.measures,
        "epochs": listener.epochs,
        "rows": batch.row,
    }


def few_rows():
    """One row to validate, one label to train on: the other rank has none, and nobody may wait for it."""
    feed = feed_of(X[:1], Y[:1] * 0, rank=distributed.rank(), world=distributed.world())
    mode, sections = SCENARIOS["end-to-end"]
    found = resolved(**sections | {"finetune": sections["finetune"] | {"micro_batches": 2}})
    trainer = trainer_of(found, mode, feed)
    trainer.validate = judge(trainer, feed)
    trainer.run()
    return {"weights": weights(trainer.model), "history": trainer.progress.history}


def poisoned():
    """A row that is not a number on the last rank alone: every rank must skip the step."""
    feed = feed_of(X, Y, rank=distributed.rank(), world=distributed.world())
    trainer = trainer_of(resolved(), "pretrain", feed)
    before = weights(trainer.model)
    (batch,) = feed.batches([(trainer.runs[0].phase.draw, 0)])
    if distributed.rank() == distributed.world() - 1:
        batch.x[0, 0] = torch.nan
    trainer.make_step(trainer.runs[0], [batch])
    return {"before": before, "after": weights(trainer.model), "skipped": int(trainer.runs[0].watch.skipped)}


def work(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    with distributed.process_group("cpu"):
        results = {name: train(name, 2) for name in SCENARIOS}
        results |= {"few rows": few_rows(), "poisoned": poisoned()}
    torch.save(results, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (2, port, folder), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_rank():
    return {name: train(name, 4) for name in SCENARIOS}


EVERY = pytest.mark.parametrize("name", SCENARIOS)


@EVERY
def test_the_gradient_of_a_step_is_the_same(two_ranks, one_rank, name):
    for rank in two_ranks:
        assert_same(rank[name]["gradients"], one_rank[name]["gradients"], atol=1e-10)


@EVERY
def test_the_global_batch_is_the_same(two_ranks, one_rank, name):
    theirs = torch.cat([rank[name]["rows"] for rank in two_ranks])
    assert sorted(theirs.tolist()) == sorted(one_rank[name]["rows"].tolist())


@EVERY
def test_weights_after_a_run_are_the_same(two_ranks, one_rank, name):
    for rank in two_ranks:
        assert_same(rank[name]["weights"], one_rank[name]["weights"], atol=1e-10)
        assert_same(rank[name]["kept"], one_rank[name]["kept"], atol=1e-10)


@EVERY
def test_readings_are_means_over_all_ranks(two_ranks, one_rank, name):
    """Sums are kept in float32, hence 1e-5."""
    assert one_rank[name]["measures"]
    for rank in two_ranks:
        for (step, found), (expected_step, expected) in zip(rank[name]["measures"], one_rank[name]["measures"], strict=True):
            assert step == expected_step
            assert found == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_mean_over_all_ranks(two_ranks, one_rank):
    expected = one_rank["pretrain"]["epochs"]
    assert [sorted(values) for _, _, values in expected] == [["val/loss", "val/mse", "val/reconstruction", "val/sparse_l1"]] * 2
    for rank in two_ranks:
        for (epoch, step, found), (*place, values) in zip(rank["pretrain"]["epochs"], expected, strict=True):
            assert [epoch, step] == place
            assert found == pytest.approx(values, rel=1e-9)


def test_a_rank_without_rows_does_not_hold_up_the_other(two_ranks):
    alone = few_rows()
    for rank in two_ranks:
        assert_same(rank["few rows"]["weights"], alone["weights"], atol=1e-10)
        assert [entry.keys() for entry in rank["few rows"]["history"]] == [entry.keys() for entry in alone["history"]]


def test_all_ranks_skip_what_one_rank_cannot_use(two_ranks):
    for rank in two_ranks:
        assert_same(rank["poisoned"]["after"], rank["poisoned"]["before"])
        assert rank["poisoned"]["skipped"] == 1


def test_alone_there_is_one_rank():
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    with distributed.process_group("cpu") as device:
        assert device == CPU
    step = torch.nn.Linear(2, 3)
    assert distributed.parallel(step) is step
