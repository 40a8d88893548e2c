"""What a stage pays for being tracked and saved: with MLflow and a checkpoint each epoch, and with stores that fail."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np

from ssl_ae import recipe as recipes
from ssl_ae.data.pack import pack
from ssl_ae.data.sources import PackOptions
from ssl_ae.plan import pretraining
from ssl_ae.progress import Reporter
from ssl_ae.registry import Registry
from ssl_ae.runs import Inputs
from ssl_ae.stages.training_run import train
from ssl_ae.stages.workspace import open_workspace
from tests.benchmarks.kit import Bar, Row, Side
from tests.benchmarks.rows.vae_step import MODEL
from tests.benchmarks.training_sides import images
from tests.faults.tracking_kit import Gate

ROWS, EPOCHS, BATCH = 60_000, 4, 128  # as many rows as MNIST's train split, of which a tenth is held out
ROUNDS = 5  # of some ten seconds a side


def training(where: Path, registry: Registry, store: str | None, saved: bool, loop_only: bool = False) -> Side:
    """One stage from its first step to the last delivery to `store` (None: not tracked), in processor seconds, threads included.

    `loop_only`: by the clock, and the training loop alone, whose steps must not wait for a store.
    """
    settings = {"epochs": EPOCHS, "batch_size": BATCH}
    tree = {"name": "bench", "data": {"path": str(where / "data")}, "model": MODEL, "pretrain": settings, "device": "cpu"}
    recipe = recipes.parse(tree)

    def work() -> float | None:
        tracking = {"SSL_AE_TRACKING": "journal"} if store is None else {"SSL_AE_TRACKING": "live", "MLFLOW_TRACKING_URI": store}
        with (
            mock.patch.dict(os.environ, tracking),
            tempfile.TemporaryDirectory(dir=where) as run,
            open_workspace(recipe, Path(run), "bench", Reporter(silent=True), registry) as ws,
        ):
            model, feed, stage = ws.fresh_model(head=False), ws.feed("train"), ws.pretrained
            plan = pretraining(ws.resolved, model, feed.split.rows)
            ws.claim(stage, Inputs(ws.pretrain_fields()), restart=False)
            loop = {"name": "bench", "val": ws.feed("val"), "stage": stage if saved else None}
            with nullcontext() if store is None else ws.tracker(stage, "pretrain") as tracker:
                _, progress = train(ws, model, plan, feed, recipe.pretrain, tracker=tracker, **loop)
        return progress.seconds if loop_only else None

    return Side(work)


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        where, registry = Path(folder), Registry.discover()
        np.savez(where / "x.npz", x=np.resize(images()[:, 0], (ROWS, 28, 28)))
        pack(str(where / "x.npz"), where / "data", PackOptions(), registry.sources())
        yield Row(
            metric=f"tracking and checkpoints: VAE 784-512-16, {EPOCHS} epochs of {ROWS * 9 // 10:,} rows",
            unit="s",
            sides={
                "ours": training(where, registry, f"sqlite:///{where / 'mlflow.db'}", saved=True),
                "limit": training(where, registry, None, saved=False),
                "checkpoints, no tracking": training(where, registry, None, saved=True),
            },
            bars=(Bar("limit", 1.02),),
            note="limit: the same loop and validation, neither tracked nor saved; mlflow's import is paid once, before",
            rounds=ROUNDS,
        )
        with closing(Gate(backend=0)) as gate:
            for state in ("shut", "hung", "500"):
                gate.state = state
                yield Row(
                    metric=f"its loop by the clock, with a store that is {state}",
                    unit="s",
                    sides={
                        "ours": training(where, registry, gate.address, saved=True, loop_only=True),
                        "without tracking": training(where, registry, None, saved=True, loop_only=True),
                    },
                    bars=(Bar("without tracking", 1.05),),
                    rounds=ROUNDS,
                )
