"""Feeds: the same rows resident or streamed, on one rank or several; scaling and back."""

import collections

import numpy as np
import psutil
import pytest
import torch

from ssl_ae.data import loading
from ssl_ae.data.card import X
from ssl_ae.data.loading import Draw, Feed, Scaling, Table
from ssl_ae.errors import DataError

ROWS = 53
STORED = np.random.default_rng(0).integers(256, size=(ROWS, 1, 3, 2), dtype=np.uint8)
IMAGES = X(kind="image", dtype="uint8", shape=(1, 3, 2), range=(0, 255))
LABELS = np.where(np.arange(ROWS) % 3 == 0, np.arange(ROWS) % 5, -1)
WEIGHTS = np.linspace(0.5, 1.5, ROWS).astype(np.float32)


class Blocks:
    """A split that lies on disk in blocks and counts how it is read."""

    def __init__(self, stored=STORED):
        self.stored, self.rows, self.row_bytes = stored, len(stored), stored[0].nbytes
        self.block_starts, self.reads = np.arange(0, len(stored), 8), []

    def read(self, rows):
        self.reads.append(np.asarray(rows))
        return self.stored[rows]


def feed(split=None, residency="resident", **more):
    options = {"seed": 7, "device": torch.device("cpu"), "residency": residency, "weight_y": WEIGHTS}
    return Feed(split or Blocks(), LABELS, Scaling(IMAGES, "range"), **options | more)


def draw(found, count=9, each=Draw(6, 2)):
    return list(found.batches((each, k) for k in range(count)))


def assert_rows_are_true(batch):
    row = batch.row.numpy()
    np.testing.assert_allclose(batch.x, STORED[row].astype(np.float32) / 255, rtol=1e-6)
    assert batch.x.dtype == torch.float32
    assert batch.y.tolist() == LABELS[row].tolist()
    assert batch.labeled.tolist() == (LABELS[row] >= 0).tolist()
    assert np.array_equal(batch.weight_y, WEIGHTS[row])


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_batches_hold_the_rows_they_name(residency):
    for batch in draw(feed(residency=residency)):
        assert_rows_are_true(batch)
        assert batch.uniform.tolist() == [True] * 6 + [False] * 2
        assert batch.labeled[6:].all()


@pytest.mark.parametrize("window", [11, 65_536])
def test_streaming_gives_the_batches_of_resident_rows(window, monkeypatch):
    monkeypatch.setattr("ssl_ae.data.order.WINDOW_ROWS", window)
    for a, b in zip(draw(feed()), draw(feed(residency="stream")), strict=True):
        assert all(torch.equal(value, vars(b)[name]) for name, value in vars(a).items() if value is not None)


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_an_epoch_sees_every_row_once(residency):
    seen = torch.cat([batch.row for batch in draw(feed(residency=residency), ROWS, Draw(1))])
    assert sorted(seen.tolist()) == list(range(ROWS))
    labeled = torch.cat([batch.row for batch in draw(feed(residency=residency), 18, Draw(0, 1))])
    assert sorted(labeled.tolist()) == np.nonzero(LABELS >= 0)[0].tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_ranks_share_the_global_batch(world, residency):
    """7 uniform rows and 3 extra: the union over ranks is one rank's batch, and no rank has over one row more."""
    whole = draw(feed(residency=residency), each=Draw(7, 3))
    ranks = [draw(feed(residency=residency, rank=rank, world=world), each=Draw(7, 3)) for rank in range(world)]
    for k, expected in enumerate(whole):
        parts = [rank[k] for rank in ranks]
        rows = sorted((int(r), bool(u)) for part in parts for r, u in zip(part.row, part.uniform, strict=True))
        assert rows == sorted((int(r), bool(u)) for r, u in zip(expected.row, expected.uniform, strict=True))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert all(part.labeled[~part.uniform].all() for part in parts)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    one, other = feed(), feed()
    draw(one)
    (late,) = one.batches([(Draw(6, 2), 4)])
    assert torch.equal(late.row, draw(other)[4].row)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_order_every_row_once_over_the_ranks(world):
    seen = []
    for rank in range(world):
        for batch in feed(rank=rank, world=world).in_order(5):
            assert_rows_are_true(batch)
            assert batch.uniform.all()
            seen += batch.row.tolist()
    assert sorted(seen) == list(range(ROWS))
    assert [batch.row.tolist() for batch in feed().in_order(2, [4, 1, 9])] == [[4, 1], [9]]


def test_resident_rows_are_read_once():
    split = Blocks()
    found = feed(split)
    draw(found)
    assert [len(read) for read in split.reads] == [ROWS]


def test_streaming_reads_little_ahead_and_stops_with_its_reader():
    split = Blocks()
    batches = feed(split, "stream").batches((Draw(4), k) for k in range(1000))
    next(batches)
    assert len(split.reads) <= loading.PREFETCH + 1
    batches.close()
    read = len(split.reads)
    assert read <= loading.PREFETCH + 1


def test_small_batches_are_read_together_and_large_ones_apart(monkeypatch):
    split = Blocks()
    draw(feed(split, "stream"), 9, Draw(5))
    assert [len(read) for read in split.reads] == [40, 5]
    monkeypatch.setattr(loading, "READ_BYTES", 2 * 5 * 6 + 1)  # two batches of 5 rows of 6 bytes
    split = Blocks()
    draw(feed(split, "stream"), 5, Draw(5))
    assert [len(read) for read in split.reads] == [10, 10, 5]


def test_an_error_of_the_reader_reaches_the_loop():
    class Broken(Blocks):
        def read(self, rows):
            raise DataError("the shard is cut short")

    with pytest.raises(DataError, match="cut short"):
        draw(feed(Broken(), "stream"))


@pytest.mark.parametrize(("free", "resident"), [(10**9, True), (ROWS * 6 / 0.3 + 1, True), (ROWS * 6 / 0.3 - 1, False)])
def test_auto_keeps_what_takes_under_a_third_of_free_memory(free, resident, monkeypatch):
    """53 rows of 6 bytes; `auto` takes at most 0.3 of what is free."""
    memory = collections.namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(free))
    assert feed(residency="auto").resident == resident


def test_no_labels_at_all():
    found = Feed(Table(STORED), None, Scaling(IMAGES, "range"), seed=1, device=torch.device("cpu"))
    (batch,) = found.batches([(Draw(5), 0)])
    assert not batch.labeled.any()
    assert batch.y.tolist() == [-1] * 5
    with pytest.raises(ValueError, match="no rows"):
        draw(found, 1, Draw(4, 1))


def test_targets_are_labelled_where_one_is_known():
    y = np.full((ROWS, 2), np.nan, dtype=np.float32)
    y[4], y[9, 1] = 1.0, 2.0
    found = Feed(Table(STORED), y, Scaling(IMAGES, "range"), seed=1, device=torch.device("cpu"))
    assert found.labeled_rows.tolist() == [4, 9]


# --- scaling


def test_range_maps_the_cards_range_to_the_unit_interval():
    scaling = Scaling(X(kind="signal", dtype="float32", shape=(1, 2), range=(-3, 5)), "range")
    assert scaling(torch.tensor([[[-3.0, 5.0]], [[1.0, -1.0]]])).flatten().tolist() == pytest.approx([0, 1, 0.5, 0.25], abs=1e-7)


def test_standard_is_scikit_learns():
    from sklearn.preprocessing import StandardScaler

    x = (np.random.default_rng(1).normal(size=(41, 3)) * [1, 10, 0] + [5, -20, 4]).astype(np.float32)
    std = np.where(x.std(0) > 0, x.std(0), 1.0)
    card = X(kind="vector", dtype="float32", shape=(3,), range=(-99, 99), mean=tuple(x.mean(0)), std=tuple(std))
    found = Scaling(card, "standard")(torch.from_numpy(x))
    np.testing.assert_allclose(found, StandardScaler().fit_transform(x.astype(np.float64)), atol=1e-5)


@pytest.mark.parametrize("how", ["range", "standard", "none"])
def test_the_inverse_gives_back_what_is_stored(how):
    card = X(kind="vector", dtype="float32", shape=(2,), range=(-3, 5), mean=(1.0, -2.0), std=(0.5, 3.0))
    scaling, stored = Scaling(card, how), torch.tensor([[-3.0, 5.0], [0.25, 2.0]])
    torch.testing.assert_close(scaling.inverse(scaling(stored)), stored, rtol=1e-6, atol=1e-6)


def test_pixels_come_back_exactly():
    scaling, pixels = Scaling(IMAGES, "range"), torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    assert torch.equal(scaling.inverse(scaling(pixels)).round().to(torch.uint8), pixels)


def test_what_cannot_be_scaled():
    with pytest.raises(DataError, match=r"range needs a finite range of values, but the card says \[0.0, inf\]"):
        Scaling(X(kind="vector", dtype="float32", shape=(2,), range=(0, float("inf"))), "range")
    with pytest.raises(DataError, match="standard needs the mean and std"):
        Scaling(IMAGES, "standard")
