"""What a whole run leaves in MLflow, read back through MLflow's own client and model loader."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import call, with_fields, write_yaml
from conftest import TINY

from ssl_ae.data.dataset import DataSet


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, digits):
    """A whole run, delivered to the default store of its current folder; the folder and the answer of `run`."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SSL_AE_TRACKING", *(name for name in os.environ if name.startswith("MLFLOW_"))):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        stages = ["pretrain", "extract", "finetune", "evaluate"]
        path = write_yaml(folder / "recipe.yaml", with_fields(TINY, {"data.path": str(digits), "stages": stages}))
        yield folder, call("run", path, "--json").json


@pytest.fixture
def client(tracked):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tracked[0]}/runs/mlflow.db")


STAGES = {  # folder in the run: name of the MLflow run
    "pretrain": "pretrain",
    "latents": "extract",
    "finetune/sequential": "finetune/sequential",
    "evaluate/test": "evaluate/test",
}


@pytest.fixture
def runs(tracked, client):
    """{stage: its MLflow run}."""
    return {stage: client.get_run((tracked[0] / "runs/tiny" / stage / "mlflow_run_id").read_text().strip()) for stage in STAGES}


def files(client, run, folder=None) -> set[str]:
    return {Path(file.path).name for file in client.list_artifacts(run.info.run_id, folder)}


def test_nothing_went_wrong_on_the_way(tracked):
    assert not [warning for warning in tracked[1]["warnings"] if "MLflow" in warning]


def test_a_run_a_stage_under_one_parent(tracked, client, runs):
    parent = client.get_run((tracked[0] / "runs/tiny/mlflow_run_id").read_text().strip())
    for stage, run in runs.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.info.run_name, run.info.status) == (STAGES[stage], "FINISHED")
        assert client.get_experiment(run.info.experiment_id).name == "tiny"
    assert tracked[1]["mlflow_run_id"] == runs["evaluate/test"].info.run_id


def test_parameters_are_the_resolved_recipe(runs):
    for run in runs.values():
        assert run.data.params["model.latent_dim"] == "5"
        assert run.data.params["model.encoder.name"] == "builtins/mlp"
        assert run.data.params["model.decoder.widths"] == "[17]"


def test_metrics(tracked, client, runs):
    history = client.get_metric_history(runs["pretrain"].info.run_id, "val/loss")
    assert [point.step for point in history] == [11, 21]  # ceil(1298 / 128), ceil(2 * 1298 / 128)
    assert {"train/reconstruction", "train/kl", "val/mse", "system/rank-0/memory_mib"} <= runs["pretrain"].data.metrics.keys()
    assert runs["finetune/sequential"].data.metrics.keys() >= {"val/accuracy", "val/nll", "val/pca-logistic/accuracy"}
    assert runs["evaluate/test"].data.metrics["test/accuracy"] == pytest.approx(tracked[1]["metrics"]["accuracy"])
    assert "test/pca-logistic/accuracy" in runs["evaluate/test"].data.metrics


def test_datasets_are_inputs(runs, digits):
    """Each run names the splits it read, and no other: nothing but extraction and the evaluation of test read test."""
    read = {name: {entry.dataset.name: entry for entry in run.inputs.dataset_inputs} for name, run in runs.items()}
    training = {"digits-train", "digits-val"}
    assert set(read["pretrain"]) == training
    assert set(read["latents"]) == {*training, "digits-test"}
    assert set(read["finetune/sequential"]) == {*training, "latents-train", "latents-val"}
    assert set(read["evaluate/test"]) == {"digits-test"}
    assert read["pretrain"]["digits-train"].tags[0].value == "train"
    assert read["pretrain"]["digits-train"].dataset.digest == DataSet.open(digits).card.fingerprint[:36]


def test_figures_and_recipes_and_checkpoints_are_artifacts(client, runs):
    assert files(client, runs["pretrain"]) >= {"recipe.yaml", "checkpoint", "figures"}
    assert files(client, runs["pretrain"], "checkpoint") == {"model.safetensors"}
    assert files(client, runs["pretrain"], "figures") >= {"learning_curves.png", "reconstructions.png", "filters.png"}
    assert files(client, runs["latents"], "figures") == {"_map.png"}
    assert files(client, runs["finetune/sequential"]) >= {"recipe.yaml", "figures"}
    figures = {"learning_curves.png", "confusion_val.png", "latent_map.png"}
    assert files(client, runs["finetune/sequential"], "figures") == figures
    assert files(client, runs["evaluate/test"]) >= {"recipe.yaml", "metrics.json"}
    assert files(client, runs["evaluate/test"], "figures") == {"confusion_test.png"}


def test_the_model_answers_on_raw_rows_as_predict_does(tracked, runs, digits, monkeypatch):
    import mlflow

    folder, _ = tracked
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/runs/mlflow.db")
    model = mlflow.pyfunc.load_model(f"runs:/{runs['finetune/sequential'].info.run_id}/model")
    x = DataSet.open(digits).split("test").read(np.arange(13))
    answers = model.predict(x)
    assert call("predict", "runs/tiny", digits, "--out", "p.parquet").code == 0
    expected = pq.read_table("p.parquet").to_pandas().set_index("key").loc[DataSet.open(digits).split("test").keys[:13]]
    assert answers.columns.tolist() == expected.columns.tolist()
    for name in answers.columns:
        ours, theirs = answers[name].to_numpy(), expected[name].to_numpy()
        assert ours.tolist() == theirs.tolist() if name == "label" else np.allclose(ours, theirs, rtol=1e-5)


def test_a_journal_is_delivered_later(recipe, here, client, tracked, monkeypatch):
    """SSL_AE_TRACKING=journal trains without MLflow; `track sync` makes up for it."""
    path = recipe({"name": "later"})
    answer = call("pretrain", path, "--json").json
    assert answer["mlflow_run_id"] is None
    assert not (here / "runs" / "mlflow.db").exists()
    uri = f"sqlite:///{tracked[0]}/runs/mlflow.db"
    found = call("track", "sync", "runs/later", "--uri", uri, "--json").json
    assert found["command"] == "track sync"
    run_id = found["delivered"]["stages"]["pretrain"]["run_id"]
    assert client.get_run(run_id).data.metrics["val/loss"] == pytest.approx(answer["metrics"]["val/loss"])
    assert call("pretrain", path, "--json").json["mlflow_run_id"] == run_id
