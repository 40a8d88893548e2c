"""Loading: packed shards streamed and resident, and shards of one PNG a sample, against webdataset's own pipeline.

What counts is a batch as a model takes it: float32 in [0, 1] on the CPU, in an order that changes every epoch.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_ae.data.card import Card, Split
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Draw, Feed, Residency, Scaling
from ssl_ae.data.shards import ShardWriter
from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Missing, Row, Side, peer
from tests.benchmarks.rows.vae_step import MODEL

BATCH = 128
PACKED_ROWS = 131_072  # 103 MB, and two windows of the streaming order
BATCHES = 16  # of ours in a call
IMAGES = sides.images()
CARD = Card(name="bench", x={"kind": "image", "dtype": "uint8", "shape": (1, sides.SIDE, sides.SIDE), "range": (0, 255)}, splits={})


def packed(folder: Path) -> DataSet:
    """The digits over and over in block shards, as `ssl-ae data pack` writes them."""
    with ShardWriter(folder, "train") as writer:
        for start in range(0, PACKED_ROWS, len(IMAGES)):
            writer.write([f"train-{row:08d}" for row in range(start, start + len(IMAGES))], IMAGES)
        shards = writer.close()
    card = CARD.model_copy(update={"splits": {"train": Split(rows=PACKED_ROWS, shards=shards)}})
    return DataSet(folder, card, {}, None)


def one_png_a_sample(folder: Path) -> Path:
    """The digits as webdataset's own writer stores them: a PNG and a class each."""
    from webdataset import TarWriter

    path = folder / "train-000000.tar"
    with TarWriter(str(path)) as writer:
        for row, image in enumerate(IMAGES[:, 0]):
            writer.write({"__key__": f"{row:08d}", "png": _encoded(image), "cls": row % 10})
    return path


def _encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def ours(data: DataSet, residency: Residency) -> Side:
    """Batches of our feed."""
    split = data.split("train")
    feed = Feed(split, None, Scaling(data.card.x, "range"), seed=0, device=sides.CPU, residency=residency)
    batches = feed.batches((Draw(BATCH), k) for k in count())
    return Side(partial(_pull, batches, BATCHES), amount=BATCHES * BATCH)


def scaling_alone(bytes_held: np.ndarray) -> Side:
    """The same bytes to the same floats, in memory that is there already and in the order in which they lie."""
    stored = torch.from_numpy(bytes_held).split(BATCH)
    x, factor = torch.empty(BATCH, *bytes_held.shape[1:]), torch.tensor(1 / 255)

    def epoch() -> None:
        for part in stored:
            torch.mul(part, factor, out=x)

    return Side(epoch, amount=len(bytes_held))


def webdataset_pngs(shard: Path) -> Side:
    """webdataset's pipeline as its documentation writes it: shuffle, Pillow's decoding to float32 tensors, batches."""
    import webdataset

    data = webdataset.WebDataset(str(shard), shardshuffle=False).shuffle(1000).decode("torchl").to_tuple("png", "cls")
    endless = iter(data.batched(BATCH, partial=False).repeat())
    return Side(partial(_pull, endless, 1), amount=BATCH)


def _pull(batches: Iterator, many: int) -> None:
    for batch in islice(batches, many):
        x = batch[0] if isinstance(batch, (tuple, list)) else batch.x
        assert x.dtype == torch.float32
        assert len(x) == BATCH


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "packed").mkdir()
        (folder / "png").mkdir()
        blocks = packed(folder / "packed")
        shard = one_png_a_sample(folder / "png")
        them = peer("webdataset", lambda: webdataset_pngs(shard))
        limit = scaling_alone(np.resize(IMAGES, (4 * len(IMAGES), *IMAGES.shape[1:])))
        for n,s in {"stream":ours(blocks,"stream"),"resident":ours(blocks,"resident"),"foreign":ours(DataSet.open(folder/"png"),"stream"),"limit":limit,**them}.items():
            from tests.benchmarks.kit import timed
            r=timed(Row("x","rows/s",{"ours":s}),5)
            print(n, r.shown("ours"))
        return
        yield

if __name__=="__main__":
    from tests.benchmarks import kit
    list(rows())
