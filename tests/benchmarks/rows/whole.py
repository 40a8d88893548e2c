"""The whole command on MNIST: load, train three epochs, latents to Parquet, a classifier on them; against a script with pythae.

Sides are processes from their start to their end. What only we do is part of ours: checkpoints, figures, tracking, latents of
the standard deviations with keys and labels. The baselines of `finetune`, two further trainings, are left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_ae import recipe as recipes
from ssl_ae.data.dataset import DataSet
from ssl_ae.files import write_text
from tests.benchmarks import kit
from tests.benchmarks.kit import Bar, Missing, Row, Side, peer
from tests.benchmarks.rows.start import MNIST, ROOT, child
from tests.benchmarks.rows.vae_step import MODEL

ROUNDS = 3  # of some twenty seconds a side
RECIPE = {
    "name": "whole",
    "data": {"path": str(MNIST), "labels": "all"},
    "model": {**MODEL, "head": {"name": "softmax"}},
    "pretrain": {"epochs": 3, "batch_size": 128},
    "finetune": {"mode": "sequential", "solver": {"name": "lbfgs"}, "baselines": False},
    "stages": ["pretrain", "extract", "finetune"],
}


def ours(folder: Path, precision: str, tracking: str) -> Side:
    """`ssl-ae run` into an empty folder, with an empty store."""
    write_text(folder / f"{precision}.yaml", recipes.to_yaml({**RECIPE, "precision": precision}))

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as where:
            command = ("-m", "ssl_ae", "run", folder / f"{precision}.yaml")
            child(*command, where=Path(where), SSL_AE_TRACKING=tracking).work()

    return Side(work)


def pythae(folder: Path) -> Side:
    """The script, on IDX files in the order of our splits."""
    data = DataSet.open(MNIST)
    for name, splits in (("train", ("train", "val")), ("t10k", ("test",))):
        write_idx(folder / f"{name}-images-idx3-ubyte", [data.split(s).read(np.arange(data.split(s).rows))[:, 0] for s in splits])
        write_idx(folder / f"{name}-labels-idx1-ubyte", [data.labels(s).astype(np.uint8) for s in splits])

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as where:
            child("-m", "tests.benchmarks.whole_pythae", folder, where, where=Path(where)).work()

    return Side(work)


def write_idx(path: Path, parts: list[np.ndarray]) -> None:
    values = np.concatenate(parts)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


def rows() -> Iterator[Row]:
    metric, absent = "whole command, MNIST 60k, 3 epochs", Missing(f"no packed MNIST at {MNIST.relative_to(ROOT)}")
    if not MNIST.is_dir():
        yield Row(metric, "s", {"ours": absent})
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides: dict[str, Side | Missing] = {"ours": ours(folder, "fp32", "live"), **peer("pythae", lambda: pythae(folder))}
        sides["ours without MLflow (SSL_AE_TRACKING=journal)"] = ours(folder, "fp32", "journal")
        reason = kit.why_no_bf16()
        sides["ours in bf16"] = Missing(reason) if reason else ours(folder, "bf16", "live")
        yield Row(metric, "s", sides, bars=(Bar("pythae", 1 / 1.35),), rounds=ROUNDS)
