"""The order of samples: a function of (seed, epoch), every row once an epoch, one global batch for any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_ae.data import order as orders
from ssl_ae.data.loading import Draw, Feed
from ssl_ae.data.order import Order

ROWS = 97
BLOCKS = np.array([0, 13, 30, 41, 60, 83])


@pytest.fixture
def small_window(monkeypatch):
    monkeypatch.setattr(orders, "WINDOW_ROWS", 29)


def epochs(order, count, size=ROWS):
    return [order.take(epoch * size, size) for epoch in range(count)]


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["free", "along blocks"])
def test_every_epoch_is_another_permutation(blocks, small_window):
    found = epochs(Order(np.arange(ROWS), seed=5, block_starts=blocks), 4)
    for part in found:
        assert sorted(part) == list(range(ROWS))
    assert len({tuple(part) for part in found}) == 4


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["free", "along blocks"])
def test_it_is_a_function_of_seed_stream_and_epoch(blocks, small_window):
    def made(**more):
        return Order(np.arange(ROWS), **{"seed": 5, "block_starts": blocks} | more)

    walked = epochs(made(), 3)
    assert np.array_equal(made().take(2 * ROWS, ROWS), walked[2])  # without the epochs before it
    assert not np.array_equal(made(seed=6).take(0, ROWS), walked[0])
    assert not np.array_equal(made(stream=1).take(0, ROWS), walked[0])


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 400), count=st.integers(0, 300))
def test_a_stretch_may_cross_epochs(start, count):
    order = Order(np.arange(ROWS), seed=5)
    stream = np.concatenate(epochs(order, 8))
    assert np.array_equal(order.take(start, count), stream[start : start + count])


def test_a_stretch_is_the_same_wherever_one_begins(small_window):
    """Windows are drawn one after another and forgotten: going on, going back and starting in the middle agree."""
    stream = np.concatenate(epochs(Order(ROWS, seed=5, block_starts=BLOCKS), 4))
    walker = Order(ROWS, seed=5, block_starts=BLOCKS)
    for start, count in [(0, 10), (300, 20), (25, 40), (90, 200), (0, 388), (57, 1)]:
        expected = stream[start : start + count]
        assert np.array_equal(walker.take(start, count), expected)
        assert np.array_equal(Order(ROWS, seed=5, block_starts=BLOCKS).take(start, count), expected)


def test_the_order_of_a_seed_never_changes(small_window):
    """A resumed run must go on in the order that it began with."""
    found = Order(np.arange(0, 2 * ROWS, 2), seed=5, block_starts=2 * BLOCKS).take(3 * ROWS, 8)
    assert found.tolist() == [98, 40, 86, 82, 38, 112, 34, 42]  # of the order that held whole epochs


def test_members_may_be_any_rows():
    members = np.array([3, 8, 21, 40, 77])
    assert sorted(Order(members, seed=1).take(0, 5)) == members.tolist()
    assert sorted(Order(members, seed=1).take(0, 15)) == sorted(members.tolist() * 3)


def test_no_rows_can_give_nothing_only():
    assert Order(np.arange(0), seed=1).take(0, 0).shape == (0,)
    with pytest.raises(ValueError, match="order of no rows"):
        Order(np.arange(0), seed=1).take(0, 1)


def test_a_window_of_the_stream_touches_few_blocks(small_window):
    """29 consecutive rows lie in whole blocks of at least 11 rows, cut at both ends: in no more than 4 of the 6."""
    order = Order(np.arange(ROWS), seed=5, block_starts=BLOCKS)
    for epoch in range(20):
        rows = order.take(epoch * ROWS, ROWS)
        for start in range(0, ROWS, 29):
            assert len(np.unique(np.searchsorted(BLOCKS, rows[start : start + 29], side="right"))) <= 4


def test_rows_within_one_window_are_shuffled_freely():
    """Fewer rows than a window: blocks change nothing, so data in memory and on disk have one order."""
    assert ROWS <= orders.WINDOW_ROWS
    plain, blocks = Order(np.arange(ROWS), seed=5), Order(np.arange(ROWS), seed=5, block_starts=BLOCKS)
    assert np.array_equal(plain.take(0, 2 * ROWS), blocks.take(0, 2 * ROWS))


def test_permutations_are_uniform():
    """2,400 epochs of 4 rows: each of 24 orders 100 times; chi-squared of 23 degrees stays under its 1e-6 quantile, 73."""
    order = Order(np.arange(4), seed=11)
    seen, counts = np.unique([order.take(4 * epoch, 4) for epoch in range(2400)], axis=0, return_counts=True)
    assert len(seen) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 73


class Huge:
    """A thousand million rows in blocks, that nobody reads."""

    rows, row_bytes = 10**9, 784
    block_starts = np.arange(0, rows, 1024)


@pytest.mark.parametrize("step", [0, 13])  # 13: across the end of a window
def test_a_thousand_ranks_share_one_global_batch_of_a_thousand_million_rows(step):
    draw = Draw(5_003)  # no multiple of the ranks
    feed = Feed(Huge, None, None, seed=5, device=torch.device("cpu"), residency="stream")
    whole, _ = feed._rows(draw, step)
    assert len(np.unique(whole)) == 5_003
    for world in (7, 1_000):
        shares, feed.world = [], world
        for rank in range(world):
            feed.rank = rank
            shares.append(feed._rows(draw, step)[0])
        assert {len(share) for share in shares} == {5_003 // world, 5_003 // world + 1}
        assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(whole))
