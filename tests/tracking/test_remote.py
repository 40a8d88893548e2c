"""Against a real MLflow server that stops answering and comes back."""

import os
import signal
import time

import pytest
from faults.tracking_kit import mlflow_server

from ssl_ae.tracking import Tracker, sync


@pytest.fixture
def server(local_store, tmp_path):
    with mlflow_server(tmp_path, local_store) as (port, group):
        yield f"http://127.0.0.1:{port}", group


@pytest.mark.slow
def test_everything_passes_a_server_and_one_that_hangs_gets_the_rest_later(server, client, tmp_path, monkeypatch):
    address, group = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run = tmp_path / "runs" / "digits"
    (tmp_path / "served.py").write_text("from ssl_ae.tracking.serving import serve\nserve(lambda folder: None)\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "weights").write_bytes(b"weights")

    def stage(name):
        return Tracker(run / name, experiment="digits", run_folder=run, stage=name, parameters={"seed": 7})

    first = stage("pretrain")
    for step in range(1_200):
        first.metrics({"train/loss": step / 7}, step)
    first.dataset("digits", "abc", "/data/digits", "train", 5)
    first.artifact(tmp_path / "export")
    first.model(tmp_path / "served.py", tmp_path / "export", {"kind": "vector", "dtype": "float32", "shape": [3]})
    run_id = first.close()
    assert first.warnings == []
    (run / "pretrain" / "journal" / "cursor.json").unlink()  # the same again, through the server
    assert sync(run)["warnings"] == []
    stored = client.get_run(run_id)
    assert (stored.info.status, stored.data.params) == ("FINISHED", {"seed": "7"})
    assert len(client.get_metric_history(run_id, "train/loss")) == 1_200
    assert len(stored.inputs.dataset_inputs) == len(stored.outputs.model_outputs) == 1
    assert [path.read_bytes() for path in (tmp_path / "served").rglob("weights")] == [b"weights"] * 2  # artifact, model

    second = stage("finetune")
    os.killpg(group, signal.SIGSTOP)
    second.metrics({"train/loss": 0.5}, 1)
    begun = time.monotonic()
    assert second.close(timeout_seconds=10) is None
    assert time.monotonic() - begun < 15
    assert len(second.warnings) == 1
    os.killpg(group, signal.SIGCONT)
    delivered = sync(run)["stages"]["finetune"]
    assert [metric.value for metric in client.get_metric_history(delivered["run_id"], "train/loss")] == [0.5]
    assert client.get_run(delivered["run_id"]).info.status == "FINISHED"
