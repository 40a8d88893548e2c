"""Two ranks equal one: real processes, gloo and DistributedDataParallel through the real Trainer, in float64."""

import pytest
import torch
from engine_kit import CPU, assert_same
from rank_kit import SCENARIOS, SHARDED, few_rows, of_two_ranks, resumed, train, work

from ssl_ae import distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return of_two_ranks(work, tmp_path_factory.mktemp("ranks"))


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


def test_ranks_learn_at_one_step_that_one_of_them_is_to_stop(two_ranks):
    for rank in two_ranks:
        assert rank["agreed"] == [16, 24, 32]  # summed up after step 8, looked at 8 steps later


@pytest.mark.parametrize("name", SHARDED)
def test_shards_of_the_model_train_as_the_whole(two_ranks, name):
    for rank in two_ranks:
        sharded, whole = rank[f"sharded {name}"], rank[f"whole {name}"]
        for part in ("gradients", "weights", "kept"):
            assert_same(sharded[part], whole[part], atol=1e-10)
        for (_, found), (_, expected) in zip(sharded["measures"], whole["measures"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)  # sums in float32
        for (*_, found), (*_, expected) in zip(sharded["epochs"], whole["epochs"], strict=True):
            assert found == pytest.approx(expected, rel=1e-9)


def test_shards_in_single_precision(two_ranks):
    for rank in two_ranks:
        whole, sharded = rank["float32"]
        assert_same(sharded, whole, atol=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_a_checkpoint_of_shards_goes_on_anywhere(two_ranks, name):
    sharded = two_ranks[0][f"sharded {name}"]
    assert_same(resumed(name, 4, sharded["checkpoint"], adamw=True), sharded["kept"], atol=1e-10)  # on one rank, whole
    assert_same(sharded["from whole"], sharded["kept"], atol=1e-10)


def test_alone_there_is_one_rank():
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    with distributed.process_group("cpu") as device:
        assert device == CPU
    step = torch.nn.Linear(2, 3)
    assert distributed.parallel(step) is step
