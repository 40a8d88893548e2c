"""The codes of 60,000 images in Parquet, by the encoder of a VAE 784-512-16: against pythae, and against its matrix products."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ssl_ae import latents
from ssl_ae import recipe as recipes
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.pack import pack
from ssl_ae.data.sources import PackOptions
from ssl_ae.model import Model, build
from ssl_ae.progress import Reporter
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve
from ssl_ae.stages.extract import BATCH_ROWS, columns_of, encode, write_split
from ssl_ae.stages.workspace import Workspace, no_denormals
from tests.benchmarks import training_sides as sides
from tests.benchmarks.kit import Bar, Row, Side, peer
from tests.benchmarks.rows.vae_step import MODEL

ROWS = 60_000
CPU = torch.device("cpu")
FACTS = {"recipe_fingerprint": "benchmark"}
PEERS_BATCH = 1024  # the best for pythae's `embed`, which takes 1.3 times as long for all rows at once


def images() -> np.ndarray:
    """(ROWS, 28, 28) uint8."""
    return np.resize(sides.images()[:, 0], (ROWS, sides.SIDE, sides.SIDE))


def packed(folder: Path) -> Path:
    """The images with labels as a data set: train and val, 54,000 and 6,000 rows."""
    np.savez(folder / "images.npz", x_train=images(), y_train=np.arange(ROWS) % 10)
    pack(str(folder / "images.npz"), folder / "data", PackOptions(), Registry.discover().sources())
    return folder / "data"


class Extraction:
    """What `ssl-ae extract` does once the recipe is read, and its two halves by themselves."""

    def __init__(self, folder: Path) -> None:
        self.path, self.run = packed(folder), folder / "run"
        tree = {"name": "bench", "data": {"path": str(self.path)}, "model": MODEL}
        data = DataSet.open(self.path)
        self.resolved = resolve(recipes.parse(tree), Registry.discover(), data.card)
        torch.manual_seed(0)
        self.model: Model = build(self.resolved, head=False)
        self.ws = self.workspace(data)
        self.samples = data.split("train")
        self.rows = self.samples.rows
        self.tables = [
            {"key": self.samples.keys[part.start : part.stop], "label": data.labels("train")[part.start : part.stop], **codes}
            for part, codes in zip(latents.parts_of(self.rows), self.encoded(), strict=True)
        ]

    def workspace(self, data: DataSet) -> Workspace:
        return Workspace(self.resolved, data, self.run, CPU, Reporter(silent=True))

    def whole(self) -> None:
        """Read samples, keys and labels, encode, write; both splits."""
        ws = self.workspace(DataSet.open(self.path))
        with no_denormals():  # as every stage runs
            for split in ws.card.splits:
                folder = self.run / "latents" / split
                shutil.rmtree(folder, ignore_errors=True)  # parts that are there are kept
                write_split(ws, self.model, ws.data, split, folder, FACTS, columns_of(ws, scores=False, layer=None))

    def encoded(self) -> list[dict[str, np.ndarray]]:
        """Read the train samples, and encode."""
        columns = columns_of(self.ws, scores=False, layer=None)
        with no_denormals():
            return [encode(self.model, self.samples, part, self.ws.scaling, CPU, columns) for part in latents.parts_of(self.rows)]

    def write(self) -> None:
        """Only write, train."""
        folder = self.run / "written"
        for i, table in enumerate(self.tables):
            latents.write_part(latents.part_of(folder, i), table, FACTS)
        latents.finish(folder, self.rows, FACTS, "classes")


def products(rows: int) -> Side:
    """The encoder's matrix products on float32 images that lie in memory; its hidden layer was just computed, so it is near."""
    x, h = torch.rand(rows, sides.PIXELS), torch.rand(BATCH_ROWS, sides.HIDDEN)
    first, second = torch.randn(sides.HIDDEN, sides.PIXELS), torch.randn(2 * sides.LATENT, sides.HIDDEN)

    @torch.inference_mode()
    def work() -> None:
        for part in x.split(BATCH_ROWS):
            part @ first.T
            h[: len(part)] @ second.T

    return Side(work, amount=rows)


def pythae_embedding(folder: Path) -> Side:
    """pythae's `embed` of images that are float32 already, and their table as pyarrow writes it."""
    from pythae.models import VAE, VAEConfig

    torch.manual_seed(0)
    model = VAE(VAEConfig(input_dim=(1, sides.SIDE, sides.SIDE), latent_dim=sides.LATENT, reconstruction_loss="bce")).eval()
    x, labels = torch.from_numpy(images()[:, None]).float() / 255, np.arange(ROWS) % 10

    @torch.no_grad()
    def work() -> None:
        z = torch.cat([model.embed(part) for part in x.split(PEERS_BATCH)]).numpy()
        codes = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), sides.LATENT)
        pq.write_table(pa.table({"label": labels, "latent": codes}), folder / "pythae.parquet")

    return Side(work, amount=ROWS)


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = Extraction(folder)
        yield Row(
            metric="extraction to Parquet, 60,000 rows, MLP 784-512-16",
            unit="rows/s",
            sides={"ours": Side(ours.whole, ROWS), "limit": products(ROWS), **peer("pythae", lambda: pythae_embedding(folder))},
            bars=(Bar("pythae", 1 / 3.5),),
            note="limit: the encoder's matrix products alone",
        )
        yield Row(
            metric="... its encoding alone",
            unit="rows/s",
            sides={"ours": Side(lambda: ours.encoded() and None, ours.rows), "limit": products(ours.rows)},
            bars=(Bar("limit", 1 / 0.95),),
        )
        yield Row(
            metric="... its writing, of the whole",
            unit="rows/s",
            sides={"ours": Side(ours.write, ours.rows), "whole extraction": Side(ours.whole, ROWS)},
            bars=(Bar("whole extraction", 0.05),),
        )
