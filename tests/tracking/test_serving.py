import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssl_ae.errors import DataError, SslAeError
from ssl_ae.tracking import Tracker, sync, ui
from ssl_ae.tracking.serving import columns, rows

ROOT = Path(__file__).parents[2]
VECTOR = {"kind": "vector", "dtype": "float32", "shape": [3], "features": ["b", "a", "c"]}
IMAGE = {"kind": "image", "dtype": "uint8", "shape": [2, 3, 5], "features": None}

SCRIPT = """
import json
import numpy as np
from ssl_ae.tracking.serving import serve

class Weighted:
    def __init__(self, weights):
        self.weights = np.array(weights)

    def predict(self, x):
        flat = x.reshape(len(x), -1).astype(np.float64)
        score = flat @ self.weights
        return {"label": (score > 0).astype(np.int64), "probability": np.stack([-score, score], axis=1)}

serve(lambda folder: Weighted(json.loads((folder / "weights.json").read_text())))
"""


@pytest.fixture
def logged(local_store, tmp_path, monkeypatch):
    """Logs a linear model over `x` with the weights 1, 10, 100, ...; returns (its URI, the run folder)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_store)

    def log(x):
        script = tmp_path / "served.py"
        script.write_text(SCRIPT)
        folder = tmp_path / "export"
        folder.mkdir()
        (folder / "weights.json").write_text(json.dumps([10.0**power for power in range(math.prod(x["shape"]))]))
        run = tmp_path / "runs" / "digits"
        with Tracker(run / "finetune", experiment="e", run_folder=run, stage="finetune") as stage:
            stage.model(script, folder, x, requirements=["ssl-ae-ksparse==0.1"])
        assert stage.warnings == []
        return f"runs:/{stage.close()}/model", run

    return log


def test_a_vector_model_answers_on_frames_in_any_order_and_on_plain_arrays(logged, client):
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    uri, run = logged(VECTOR)
    model = mlflow.pyfunc.load_model(uri)
    # b + 10 a + 100 c, by hand
    frame = pd.DataFrame({"key": ["x", "y"], "a": [1, -7], "c": [0.0, 0.0], "b": [2, 3]})
    answer = model.predict(frame)
    assert list(answer.columns) == ["label", "probability_0", "probability_1"]
    assert answer["label"].tolist() == [1, 0]
    assert answer["probability_1"].tolist() == [12.0, -67.0]
    for same in (np.array([[2, 1, 0], [3, -7, 0]]), [[2, 1, 0], [3, -7, 0]], {"a": [1, -7], "b": [2, 3], "c": [0, 0]}):
        assert model.predict(same)["probability_1"].tolist() == [12.0, -67.0]
    with pytest.raises(mlflow.MlflowException, match="lack 1 of the model's 3 columns: c"):
        model.predict(frame.drop(columns="c"))

    info = mlflow.models.get_model_info(uri)
    assert info.metadata == {"x": VECTOR}
    requirements = Path(mlflow.artifacts.download_artifacts(f"{uri}/requirements.txt")).read_text().split()
    assert "ssl-ae-ksparse==0.1" in requirements
    assert not [name for name in requirements if "+" in name]  # no index knows torch==2.13.0+cpu
    assert not list(Path(mlflow.artifacts.download_artifacts(uri)).rglob("*.pkl"))

    (run / "finetune" / "journal" / "cursor.json").unlink()  # delivered again: still one model
    sync(run)
    assert len(client.search_logged_models([client.get_experiment_by_name("e").experiment_id])) == 1


def test_an_image_model_answers_on_tensors(logged, client):
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    uri, _ = logged(IMAGE)
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 5), dtype=np.uint8)
    answer = mlflow.pyfunc.load_model(uri).predict(images)
    expected = images.reshape(7, 30) @ 10.0 ** np.arange(30)
    np.testing.assert_allclose(answer["probability_1"], expected, rtol=1e-12)


@pytest.mark.parametrize("whole", [{"x": np.arange(60).reshape(2, 2, 3, 5)}, pd.DataFrame(np.arange(60).reshape(2, 30))])
def test_images_come_as_tensors_or_flat_rows_of_whole_numbers(whole):
    x = rows(whole, IMAGE)
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, np.arange(60).reshape(2, 2, 3, 5))


@pytest.mark.parametrize(
    ("given", "x", "message"),
    [
        (np.full((2, 2, 3, 5), 0.5), IMAGE, "whole numbers from 0 to 255"),
        (np.full((2, 2, 3, 5), 256), IMAGE, "whole numbers from 0 to 255"),
        (np.full((2, 2, 3, 5), np.nan), IMAGE, "whole numbers from 0 to 255"),
        (np.zeros((2, 5, 3, 2)), IMAGE, r"shape \(n, 2, 3, 5\), got \(2, 5, 3, 2\)"),
        (np.zeros(3), VECTOR, r"shape \(n, 3\), got \(3,\)"),
        ([[1, 2, 3], [4]], VECTOR, "must be numbers"),
        ([["1", "two", "3"]], VECTOR, "must be numbers"),
        (pd.DataFrame({"A": [1], "B": [2], "C": [3]}), VECTOR, "columns: b, a, c"),
    ],
)
def test_other_rows_are_refused_in_one_sentence(given, x, message):
    with pytest.raises(ValueError, match=message):
        rows(given, x)


def test_a_matrix_of_predictions_becomes_columns():
    flat = columns({"label": np.arange(2), "probability": np.array([[0.1, 0.9], [0.7, 0.3]])})
    assert {name: values.tolist() for name, values in flat.items()} == {
        "label": [0, 1],
        "probability_0": [0.1, 0.7],
        "probability_1": [0.9, 0.3],
    }


@pytest.mark.slow
def test_mlflows_command_answers_on_a_csv_file(logged, tmp_path):
    uri, _ = logged(VECTOR)
    (tmp_path / "rows.csv").write_text("a,c,b\n1,0,2\n-7,0,3\n")
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", uri, "-i", "rows.csv", "-t", "csv"]
    command += ["-o", "answer.json", "--env-manager", "local"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    predictions = json.loads((tmp_path / "answer.json").read_text())["predictions"]
    assert [row["probability_1"] for row in predictions] == [12.0, -67.0]


@pytest.mark.slow
def test_mlflows_server_answers_on_json_and_says_400_to_bad_rows(logged, tmp_path, closed_port):
    uri, _ = logged(IMAGE)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--port", str(closed_port)]
    # mlflow starts `uvicorn` by its name alone
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    with subprocess.Popen([*command, "--env-manager", "local"], cwd=tmp_path, env=environment, start_new_session=True) as server:
        try:
            _wait_for(f"http://127.0.0.1:{closed_port}/ping")
            answers = [_post(closed_port, {"inputs": np.ones((7, *shape)).tolist()}) for shape in ((2, 3, 5), (5, 3, 2))]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    assert [status for status, _ in answers] == [200, 400]
    assert len(json.loads(answers[0][1])["predictions"]) == 7
    assert "got (7, 5, 3, 2)" in answers[1][1]


@pytest.mark.slow
def test_the_pages_run_with_one_worker_and_no_job_runner_and_stop_on_interrupt(local_store, tmp_path, closed_port):
    import psutil

    code = f"from ssl_ae.tracking import ui; ui(port={closed_port})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as process:
        _wait_for(f"http://127.0.0.1:{closed_port}/health")
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
    # mlflow's command and its one server process, and nobody stays
    assert len(descendants) == 2
    assert not [child for child in descendants if child.is_running()]


def test_pages_need_a_local_store_and_a_free_port(local_store, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(SslAeError, match="is in use"):
            ui(port=busy.getsockname()[1])
    with pytest.raises(DataError, match=r"no MLflow store at .*/none\.db"):
        ui(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(SslAeError, match="open them in a browser"):
        ui("http://ann:secret@tracking:5000")


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"{address} did not come up"
            time.sleep(0.3)


def _post(port: int, body: dict) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
