"""Two ranks: gloo on this machine."""

import json

import numpy as np
import pyarrow.dataset
import pytest
from command_line import call, snapshot, spawn

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_ae")
ROWS = 41_003  # more than two parts of 16,384 rows, so that both ranks have some to write


@pytest.fixture
def wide(here, recipe):
    """A recipe for many small vectors of two classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, ROWS)
    np.savez(here / "x.npz", x=(rng.normal(size=(ROWS, 3)) + y[:, None]).astype(np.float32), y=y)
    assert call("data", "pack", "x.npz", "vectors").code == 0
    return recipe(
        {
            "data.path": "vectors",
            "data.labels": {"total": 200},
            "model.encoder.widths": [7],
            "model.decoder.likelihood": "gaussian",
            "pretrain": {"epochs": 1, "batch_size": 512, "log_every": 10},
            "finetune": {"epochs": 1, "batch_size": 512, "alpha": 0.1, "optimizer": {"lr": 0.01}},
            "stages": ["pretrain", "extract", {"stage": "finetune", "set": {"finetune.mode": "joint"}}],
        }
    )


def test_the_job_on_two_ranks(wide, here):
    answer = spawn("run", wide, "--json", launcher=TORCHRUN)
    assert answer.json["status"] == "done"  # one line on stdout, from one rank
    assert answer.json["metrics"]["val/accuracy"] > 0.7  # chance is 0.5, Bayes 0.81
    journals = here / "runs/tiny/pretrain/journal"
    for rank in range(2):
        lines = [json.loads(line) for line in (journals / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert f"system/rank-{rank}/memory_mib" in {name for line in lines for name in line.get("values", {})}

    tables = here / "runs/tiny/latents"
    two = {split: snapshot(tables / split) for split in ("train", "val")}
    keys = pyarrow.dataset.dataset(tables / "train").to_table()["key"].to_pylist()
    assert len(keys) == len(set(keys)) == ROWS - ROWS // 10  # one in ten is held out for validation
    for split in two:
        (tables / split / "_manifest.json").unlink()
        (tables / split / "part-00000.parquet").unlink()
    assert call("extract", "runs/tiny", "--json").json["status"] == "done"
    assert {split: snapshot(tables / split) for split in two} == two  # one rank goes on with the same bytes


@pytest.mark.slow
def test_the_whole_job_on_two_ranks_into_mlflow(wide, here, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("SSL_AE_TRACKING")
    assert spawn("pretrain", wide, "--nproc", 2, "--max-restarts", 1).code == 0
    joint = spawn("finetune", wide, "--joint", "--json", launcher=TORCHRUN)
    sequential = spawn("finetune", wide, "--sequential", "--json", launcher=TORCHRUN)
    assert spawn("evaluate", "runs/tiny", "--split", "val", launcher=TORCHRUN).code == 0
    for answer in (joint, sequential):
        assert answer.json["metrics"]["val/accuracy"] > 0.7
    client = MlflowClient(f"sqlite:///{here}/runs/mlflow.db")
    for stage in ("pretrain", "finetune/joint-alpha0.1", "finetune/sequential"):
        run = client.get_run((here / "runs/tiny" / stage / "mlflow_run_id").read_text().strip())
        assert {f"system/rank-{rank}/memory_mib" for rank in range(2)} <= run.data.metrics.keys()


@pytest.mark.slow
def test_a_mistake_on_two_ranks_is_one_message_and_nothing_is_left_behind(wide, here):
    (aside := here / "aside").mkdir()
    answer = spawn("pretrain", wide, "--nproc", 2, "--set", "model.encoder.name=mpl", TMPDIR=str(aside))
    assert answer.code == 2
    (message,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]  # rank 1 says "error on rank 1: "
    assert message.endswith("Did you mean mlp?")
    assert list(aside.iterdir()) == []
