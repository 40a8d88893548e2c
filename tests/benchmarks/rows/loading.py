"""Loading: packed shards streamed and resident, and shards of one PNG a sample, against webdataset's own pipeline.

A batch is what a model takes: float32 in [0, 1], in an order that changes every epoch. The images are digits of 28 x 28.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_ae.data.card import Card, Split, X
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Draw, Feed, Residency, Scaling
from ssl_ae.data.shards import ShardWriter
from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Row, Side, peer
from tests.benchmarks.rows import vae_step

BATCH = 128
BATCHES = 16  # of ours in a call
PACKED_ROWS = 131_072  # 103 MB: more than a processor's cache, and two windows of the order in which rows are streamed
SHUFFLED = 1000  # samples that webdataset shuffles together, as in its documentation
X28 = X(kind="image", dtype="uint8", shape=(1, sides.SIDE, sides.SIDE), range=(0, 255))


def packed(folder: Path, images: np.ndarray) -> DataSet:
    """The images over and over in block shards, as `ssl-ae data pack` writes them."""
    with ShardWriter(folder, "train") as writer:
        for start in range(0, PACKED_ROWS, len(images)):
            writer.write([f"train-{row:08d}" for row in range(start, start + len(images))], images)
        shards = writer.close()
    return DataSet(folder, Card(name="bench", x=X28, splits={"train": Split(rows=PACKED_ROWS, shards=shards)}), {}, None)


def one_png_a_sample(folder: Path, images: np.ndarray) -> Path:
    """The images as webdataset's writer stores them, a PNG and a class each.

    A whole second as time, because fractions, which are its default, give each file a second header that webdataset's
    own reader is slow about.
    """
    from webdataset import TarWriter

    shard = folder / "train-000000.tar"
    with TarWriter(str(shard), mtime=0) as writer:
        for row, image in enumerate(images[:, 0]):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            writer.write({"__key__": f"{row:08d}", "png": png.getvalue(), "cls": row % 10})
    return shard


def feed_of(data: DataSet, residency: Residency) -> Feed:
    return Feed(data.split("train"), None, Scaling(data.card.x, "range"), seed=0, device=sides.CPU, residency=residency)


def batches_of(data: DataSet, residency: Residency) -> Side:
    """Batches of our feed, epoch after epoch."""
    batches = feed_of(data, residency).batches((Draw(BATCH), k) for k in count())

    def some() -> None:
        for batch in islice(batches, BATCHES):
            check(batch.x)

    return Side(some, amount=BATCHES * BATCH)


def first_epoch(folder: Path) -> Side:
    """Opening shards without a card, which walks and hashes them, and one pass over the train split."""
    steps = DataSet.open(folder).card.splits["train"].rows // BATCH

    def epoch() -> None:
        for batch in feed_of(DataSet.open(folder), "stream").batches((Draw(BATCH), k) for k in range(steps)):
            check(batch.x)

    return Side(epoch, amount=steps * BATCH)


def webdataset_pngs(shard: Path) -> Side:
    """webdataset's reader, shuffling and batching with Pillow's decoder between; its `.decode()` is a seventh slower."""
    import webdataset

    def pixels(png: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(png)))[None]

    data = webdataset.WebDataset(str(shard), shardshuffle=False).repeat().shuffle(SHUFFLED)
    batches = iter(data.to_tuple("png", "cls").map_tuple(pixels, int).batched(BATCH))

    def one() -> None:
        x, _ = next(batches)
        check(torch.from_numpy(x).float() / 255)

    return Side(one, amount=BATCH)


def check(x: Tensor) -> None:
    assert x.dtype == torch.float32
    assert x.shape == (BATCH, 1, sides.SIDE, sides.SIDE)


def scaling_alone() -> Side:
    """As many bytes to the same floats, in memory that is there already and in the order in which they lie."""
    stored = torch.from_numpy(np.resize(sides.images(), (PACKED_ROWS, 1, sides.SIDE, sides.SIDE))).split(BATCH)
    x, factor = torch.empty(BATCH, 1, sides.SIDE, sides.SIDE), torch.tensor(1 / 255)

    def epoch() -> None:
        for part in stored:
            torch.mul(part, factor, out=x)

    return Side(epoch, amount=PACKED_ROWS)


def training() -> Side:
    """The steps that the batches are for."""
    steps = sides.ours(vae_step.MODEL, BATCH)
    return Side(steps.work, steps.amount * BATCH)


def rows() -> Iterator[Row]:
    images = sides.images()
    with tempfile.TemporaryDirectory() as blocks, tempfile.TemporaryDirectory() as pngs:
        data, shard = packed(Path(blocks), images), one_png_a_sample(Path(pngs), images)
        them = peer("webdataset", lambda: webdataset_pngs(shard))
        limit, step = scaling_alone(), training()
        yield Row(
            metric=f"packed shards streamed, batches of {BATCH} (webdataset: one PNG a sample)",
            unit="rows/s",
            sides={"ours": batches_of(data, "stream"), "limit": limit, **them, "VAE step": step},
            bars=(Bar("webdataset", 1 / 60), Bar("VAE step", 1.0)),
            note="limit: the same bytes to floats, in memory; VAE step: the rows that a step of 784-512-16 trains on",
        )
        yield Row(
            metric=f"resident, batches of {BATCH}",
            unit="rows/s",
            sides={"ours": batches_of(data, "resident"), "limit": limit, "VAE step": step},
            bars=(Bar("VAE step", 1.0), Bar("ours", at_least=1_000_000)),
        )
        yield Row(
            metric=f"shards of one PNG a sample, batches of {BATCH}",
            unit="rows/s",
            sides={"ours": batches_of(DataSet.open(Path(pngs)), "stream"), **them, "VAE step": step},
            bars=(Bar("webdataset", 1 / 3), Bar("VAE step", 1.0)),
        )
        yield Row(
            metric="the same with opening the folder: walked, hashed, labels read, one epoch",
            unit="rows/s",
            sides={"ours": first_epoch(Path(pngs)), **them},
        )
