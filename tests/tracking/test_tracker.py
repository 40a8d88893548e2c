"""Against a real SQLite store: what MLflow holds afterwards is read back through its own client."""

import http.server
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssl_ae.errors import DataError, SslAeError, Stopped
from ssl_ae.tracking import Tracker, courier, sync
from ssl_ae.tracking.delivery import Delivery
from ssl_ae.tracking.journal import rank_file, read_events
from ssl_ae.tracking.tracker import flatten

ROOT = Path(__file__).parents[2]


def tracker(run: Path, stage: str = "pretrain", **changes) -> Tracker:
    return Tracker(run / stage, **{"experiment": "digits", "run_folder": run, "stage": stage} | changes)


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "digits"


def test_a_run_inside_a_run_is_left_to_itself(client, run):
    """Such as a cell of a label curve that was killed: neither it nor its stages are stages of the run around it."""
    with tracker(run, deliver=False):
        pass
    inner = run / "cells" / "one"
    with tracker(inner, deliver=False):
        pass
    assert list(sync(run)["stages"]) == ["pretrain"]
    assert list(sync(inner)["stages"]) == ["pretrain"]


def test_everything_a_stage_reports_is_in_the_store(client, run, tmp_path):
    (tmp_path / "curve.png").write_bytes(b"png")
    (run / "pretrain" / "checkpoint").mkdir(parents=True)
    (run / "pretrain" / "checkpoint" / "weights.bin").write_bytes(b"weights")
    parameters = {"model": {"latent_dim": 17, "encoder": {"name": "mlp", "widths": [5, 3]}}, "note": "n" * 7_001}
    with tracker(run, parameters=parameters, tags={"ssl_ae.version": "1"}) as stage:
        for step in range(1_301):  # two metrics a step: more than two calls of log_batch can hold
            stage.metrics({"train/loss": 1 / (step + 1), "train/a#b": -step}, step)
        stage.metrics({"train/grad": math.nan}, 3)
        stage.dataset("digits", "f" * 64, "/data/digits", "train", 1_797)
        stage.artifact(tmp_path / "curve.png", "figures")
        stage.artifact(run / "pretrain" / "checkpoint")
    run_id = stage.close()
    assert stage.warnings == []
    assert (run / "pretrain" / "mlflow_run_id").read_text() == f"{run_id}\n"

    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "pretrain"
    assert stored.data.params == {
        "model.latent_dim": "17",
        "model.encoder.name": "mlp",
        "model.encoder.widths": "[5, 3]",
        "note": "n" * 6_000,  # MLflow's limit
    }
    assert stored.data.tags["ssl_ae.version"] == "1"
    assert history(client, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(1_301)]
    assert history(client, run_id, "train/a_b") == [(step, -step) for step in range(1_301)]
    assert math.isnan(client.get_metric_history(run_id, "train/grad")[0].value)
    (dataset,) = stored.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "f" * 36)
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "train"}
    assert [file.path for file in client.list_artifacts(run_id, "figures")] == ["figures/curve.png"]
    assert [file.path for file in client.list_artifacts(run_id, "checkpoint")] == ["checkpoint/weights.bin"]
    assert Path(stored.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path / "runs" / "mlartifacts")
    assert not (tmp_path / "mlruns").exists()

    parent = client.get_run(stored.data.tags["mlflow.parentRunId"])
    assert (run / "mlflow_run_id").read_text() == f"{parent.info.run_id}\n"
    assert (parent.info.run_name, parent.info.status) == ("digits", "FINISHED")


def test_stages_share_a_parent_and_a_resumed_stage_goes_on_in_its_run(client, run):
    first = tracker(run, parameters={"epochs": 3})
    first.metrics({"val/loss": 2.0}, 1)
    first_id = first.close("KILLED")
    assert client.get_run(first_id).info.status == "KILLED"
    again = tracker(run, parameters={"epochs": 5, "seed": 0})
    again.metrics({"val/loss": 1.0}, 2)
    assert again.close() == first_id
    other_id = tracker(run, "finetune/joint-alpha0.01").close()
    assert other_id != first_id

    assert history(client, first_id, "val/loss") == [(1, 2.0), (2, 1.0)]
    stored = client.get_run(first_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"epochs": "3", "seed": "0"}  # MLflow keeps the first value
    assert stored.data.tags["resumed.epochs"] == "5"
    runs = client.search_runs([stored.info.experiment_id])
    parents = {stored.data.tags.get("mlflow.parentRunId") for stored in runs} - {None}
    assert len(runs) == 3
    assert parents == {(run / "mlflow_run_id").read_text().strip()}


def test_delivering_again_changes_nothing(client, run, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    stage = tracker(run)
    for step in range(11):
        stage.metrics({"train/loss": step / 7, "train/nan": math.nan}, step)
    stage.dataset("digits", "abc", "/data/digits", "train", 5)
    stage.artifact(tmp_path / "a.txt")
    run_id = stage.close()
    before = client.get_run(run_id)
    for folder in (run, run / "pretrain"):
        (folder / "journal" / "cursor.json").unlink()
    report = sync(run)
    assert report["stages"]["pretrain"]["run_id"] == run_id
    assert report["stages"]["pretrain"]["metrics"] == 22 + 2 * 4  # and two samples of four system metrics
    assert history(client, run_id, "train/loss") == [(step, step / 7) for step in range(11)]
    assert len(client.get_metric_history(run_id, "train/nan")) == 11
    after = client.get_run(run_id)
    assert repr(after.to_dictionary()) == repr(before.to_dictionary())  # as text, because nan is not itself
    assert len(client.search_runs([after.info.experiment_id])) == 2


def test_a_dead_server_costs_one_warning_and_sync_delivers_everything_later(client, run, monkeypatch, closed_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(courier, "INTERVAL_SECONDS", 0.05)  # several failures, still one warning
    stage = tracker(run)
    begun = time.perf_counter()
    for step in range(503):
        stage.metrics({"train/loss": step / 7}, step)
    time.sleep(0.5)
    assert stage.close() is None
    assert time.perf_counter() - begun < 20  # mlflow's own client would block for four minutes
    assert len(stage.warnings) == 1
    assert f"ssl-ae track sync {run}" in stage.warnings[0]
    assert not (run / "pretrain" / "mlflow_run_id").exists()
    with pytest.raises(SslAeError, match="does not answer"):
        sync(run)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    report = sync(run)
    run_id = report["stages"]["pretrain"]["run_id"]
    assert report["warnings"] == report["running"] == []
    assert history(client, run_id, "train/loss") == [(step, step / 7) for step in range(503)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == report["run_id"]


def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(run, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        stage = tracker(run)
        begun = time.perf_counter()
        assert stage.close(timeout_seconds=1.5) is None
        assert 1.4 < time.perf_counter() - begun < 5
    assert len(stage.warnings) == 1


def test_a_store_that_comes_back_gets_everything_from_the_same_thread(client, run, monkeypatch):
    monkeypatch.setattr(courier, "INTERVAL_SECONDS", 0.05)
    real, failures = Delivery.deliver, iter(range(3))

    def deliver(self, folder):
        if next(failures, None) is not None:
            raise ConnectionError("500 Internal Server Error")
        return real(self, folder)

    monkeypatch.setattr(Delivery, "deliver", deliver)
    stage = tracker(run)
    stage.metrics({"train/loss": 0.5}, 1)
    deadline = time.monotonic() + 20
    while not (run / "pretrain" / "mlflow_run_id").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run_id = stage.close()
    assert history(client, run_id, "train/loss") == [(1, 0.5)]
    assert len(stage.warnings) == 1


def test_a_server_that_answers_500_is_not_asked_for_more(run, monkeypatch):
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(500)

        def log_message(self, *_): ...

    monkeypatch.setattr(courier, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(Delivery, "deliver", lambda self, folder: pytest.fail("mlflow was asked"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        stage = tracker(run)
        time.sleep(0.5)
        assert stage.close() is None
        server.shutdown()
    (warning,) = stage.warnings
    assert "does not answer (500 Internal Server Error). Nothing is lost" in warning


def test_what_an_earlier_stage_could_not_deliver_the_next_one_does(client, local_store, run, monkeypatch, closed_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    first = tracker(run)
    first.metrics({"train/loss": 0.5}, 1)
    assert first.close() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_store)
    second = tracker(run, "latents")
    assert second.close()
    assert second.warnings == []
    run_id = (run / "pretrain" / "mlflow_run_id").read_text().strip()
    assert history(client, run_id, "train/loss") == [(1, 0.5)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_damaged_line_is_told_and_the_others_arrive(client, run):
    stage = tracker(run, deliver=False)
    for step in range(3):
        stage.metrics({"train/loss": step / 7}, step)
    stage.close()
    path = rank_file(run / "pretrain", 0)
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"step": 1,' in line)
    lines[at] = lines[at].replace(b'"values"', b'"walues"')
    path.write_bytes(b"".join(lines))
    report = sync(run)
    assert history(client, report["stages"]["pretrain"]["run_id"], "train/loss") == [(0, 0.0), (2, 2 / 7)]
    (warning,) = report["warnings"]
    assert "a line of the journal that is damaged" in warning


def test_a_journal_without_its_beginning_is_named_and_other_stages_arrive(client, run):
    tracker(run, deliver=False).close()
    tracker(run, "latents", deliver=False).close()
    path = rank_file(run / "pretrain", 0)
    path.write_bytes(path.read_bytes().partition(b"\n")[2])
    report = sync(run)
    assert list(report["stages"]) == ["latents"]
    assert report["warnings"] == [f"{path} does not say whose it is: its first line is gone or damaged."]


def test_a_stage_of_another_machine_is_closed_once_it_is_silent(client, run, monkeypatch):
    elsewhere = {"host": "node-17", "pid": 3, "started": 1.7e9}
    monkeypatch.setattr("ssl_ae.tracking.tracker.this_process", lambda: elsewhere)
    stage = tracker(run, deliver=False)
    stage.metrics({"train/loss": 0.5}, 1)
    stage._sampler.stop()  # and no word more
    assert sync(run)["running"] == ["pretrain"]
    silent = time.time() - 601
    for folder in (run, run / "pretrain"):
        os.utime(rank_file(folder, 0), (silent, silent))
    report = sync(run)
    ended = client.get_run(report["stages"]["pretrain"]["run_id"])
    assert (ended.info.status, ended.info.end_time) == ("KILLED", int(silent * 1_000))
    assert client.get_run(report["run_id"]).info.status == "KILLED"


def test_every_ranks_system_metrics_are_in_the_run(client, run):
    other = tracker(run, rank=1)
    stage = tracker(run)
    assert other.close() is None  # only rank 0 has a run to name
    run_id = stage.close()
    names = set(client.get_run(run_id).data.metrics)
    for rank in (0, 1):
        assert {f"system/rank-{rank}/cpu_percent", f"system/rank-{rank}/memory_mib"} <= names
    samples = client.get_metric_history(run_id, "system/rank-1/memory_mib")
    assert {metric.step for metric in samples} == {0}  # seconds since it was opened; once at the start, once at the end
    assert all(1 < metric.value < 1e6 for metric in samples)


def test_a_run_deleted_by_hand_is_begun_anew_with_its_whole_history(client, run):
    stage = tracker(run)
    stage.metrics({"train/loss": 0.5}, 1)
    deleted = stage.close()
    client.delete_run(deleted)
    again = tracker(run)
    again.metrics({"train/loss": 0.25}, 2)
    run_id = again.close()
    assert run_id != deleted
    assert history(client, run_id, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_a_deleted_experiment_is_restored(client, run):
    run_id = tracker(run).close()
    experiment_id = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment_id)
    tracker(run).close()
    assert client.get_experiment(experiment_id).lifecycle_stage == "active"


def test_an_artifact_that_is_gone_is_told_and_the_rest_arrives(client, run, tmp_path):
    stage = tracker(run, deliver=False)
    stage.artifact(tmp_path / "gone.png", "figures")
    stage.metrics({"train/loss": 0.5}, 1)
    assert stage.close() is None
    report = sync(run)
    assert history(client, report["stages"]["pretrain"]["run_id"], "train/loss") == [(1, 0.5)]
    (warning,) = report["warnings"]
    assert "gone.png is gone" in warning


def test_a_run_folder_can_be_moved_before_it_is_delivered(client, run, tmp_path):
    stage = tracker(run, deliver=False)
    (run / "pretrain" / "metrics.json").write_text("{}")
    stage.artifact(run / "pretrain" / "metrics.json")
    stage.close()
    moved = run.rename(tmp_path / "elsewhere")
    report = sync(moved)
    assert report["warnings"] == []
    assert [file.path for file in client.list_artifacts(report["stages"]["pretrain"]["run_id"])] == ["metrics.json"]


def test_a_killed_process_loses_nothing_and_its_run_is_closed_as_killed(client, run):
    child = f"""
import os, signal
from pathlib import Path
from ssl_ae.tracking import Tracker
run = Path({str(run)!r})
stage = Tracker(run / "pretrain", experiment="digits", run_folder=run, stage="pretrain", deliver=False)
for step in range(97):
    stage.metrics({{"train/loss": step / 7}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, check=False)
    assert done.returncode == -9
    report = sync(run)
    run_id = report["stages"]["pretrain"]["run_id"]
    assert history(client, run_id, "train/loss") == [(step, step / 7) for step in range(97)]
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(report["run_id"]).info.status == "KILLED"


def test_sync_leaves_a_living_stage_to_its_own_thread(client, run):
    stage = tracker(run, deliver=False)
    tracker(run, "latents", deliver=False).close()
    report = sync(run)
    assert (list(report["stages"]), report["running"]) == (["latents"], ["pretrain"])
    stage.close()
    assert list(sync(run)["stages"]) == ["latents", "pretrain"]


def test_sync_to_another_store_makes_its_own_run_there(client, local_store, run, tmp_path, empty_database):
    stage = tracker(run)
    stage.metrics({"train/loss": 0.5}, 1)
    first = stage.close()
    other = tmp_path / "other.db"
    other.write_bytes(empty_database.read_bytes())
    second = sync(run, f"sqlite:///{other}")["stages"]["pretrain"]
    assert second["run_id"] != first
    assert second["metrics"] > 1
    assert sync(run)["stages"]["pretrain"] == {"run_id": first, "metrics": 0, "datasets": 0, "artifacts": 0, "models": 0}


def test_sync_needs_a_run_folder(tmp_path):
    with pytest.raises(DataError, match="holds no journal"):
        sync(tmp_path)


def test_a_file_store_is_refused_before_anything_is_written(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    with pytest.raises(SslAeError, match="sqlite"):
        tracker(run)
    assert not run.exists()


@pytest.mark.parametrize(
    ("error", "status"), [(Stopped("saved"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED")]
)
def test_an_error_ends_the_run_as_what_it_was(run, error, status):
    def fail():
        with tracker(run, deliver=False):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [event["status"] for event, _ in read_events(rank_file(run / "pretrain", 0)) if event["event"] == "close"] == [status]


def test_a_new_store_is_made_by_the_thread(run, tmp_path):
    stage = tracker(run)
    assert stage.close()
    assert stage.warnings == []
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "mlflow.db"]


def test_names_become_what_mlflow_allows():
    # mlflow.utils.validation: alphanumerics, _-. :/ and no path that normalises to another
    assert flatten({"a": {"b#c": 1}, "..": {"x": 2}, "/p//q/": 3, "": 4, "empty": {}}) == {
        "a.b_c": "1",
        "...x": "2",
        "p/q": "3",
        "_": "4",
        "empty": "{}",
    }
