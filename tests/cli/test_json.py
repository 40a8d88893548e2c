"""`--json`: one line on stdout, one object, the same seven fields everywhere."""

import json
import math

import pytest
from command_line import call

COMMON = {"command", "run", "status", "outputs", "metrics", "mlflow_run_id", "warnings"}


@pytest.fixture(scope="module")
def answers(finished, digits, tmp_path_factory) -> dict[str, dict]:
    """What each command answers in a finished run."""
    folder = tmp_path_factory.mktemp("json")
    recipe = finished.parents[1] / "recipe.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_TRACKING", "journal")
        patch.chdir(folder)
        commands = {
            "data pack": ["digits", "data/digits"],
            "data inspect": ["data/digits"],
            "data list": ["data"],
            "recipe show": [recipe],
            "pretrain": [recipe, "--out", "run"],
            "extract": ["run"],
            "finetune": [recipe, "--out", "run", "--joint"],
            "evaluate": ["run"],
            "predict": ["run", digits, "--out", "p.parquet"],
            "reconstruct": ["run", digits, "--out", "cleaned"],
            "sample": ["run", "--out", "samples.png", "--npy", "samples.npy"],
            "search": ["run", "--query", "digits-00000000", "--top", "3"],
            "suggest": ["run", "--budget", "5", "--out", "sheet.csv"],
            "run": [recipe, "--out", "again", "--epochs", "1"],
        }
        return {command: call(*command.split(), *words, "--json").json for command, words in commands.items()}


MORE = {
    "data pack": set(),
    "data inspect": {"report"},
    "data list": {"data"},
    "recipe show": {"recipe"},
    "pretrain": set(),
    "extract": set(),
    "finetune": {"method"},
    "evaluate": {"split", "method", "rows", "methods", "baselines"},
    "predict": {"method"},
    "reconstruct": set(),
    "sample": {"source", "prior", "components"},
    "search": {"results"},
    "suggest": {"rule"},
    "run": {"split", "method", "rows", "methods", "baselines"},  # of its last stage
}


@pytest.mark.parametrize("command", MORE)
def test_the_fields(answers, command):
    answer = answers[command]
    assert answer.keys() == COMMON | MORE[command]
    assert answer["command"] == command
    assert answer["status"] == "done"
    assert all(isinstance(path, str) for path in answer["outputs"].values())
    assert all(isinstance(value, float) for value in answer["metrics"].values())
    assert all(isinstance(warning, str) for warning in answer["warnings"])


@pytest.mark.parametrize("command", ["pretrain", "extract", "finetune", "evaluate", "predict", "reconstruct", "sample"])
def test_the_run_is_the_folder(answers, command):
    assert answers[command]["run"] == "run"


def test_metrics_have_the_names_that_are_promised(answers):
    assert answers["evaluate"]["metrics"].keys() == {"accuracy", "error", "nll", "ece"}
    assert answers["run"]["metrics"].keys() == {"accuracy", "error", "nll", "ece"}
    for command in ("pretrain", "finetune", "extract"):
        assert "accuracy" not in answers[command]["metrics"]  # the score itself is evaluate's alone
    assert answers["pretrain"]["metrics"].keys() == {
        "train/reconstruction", "train/kl", "val/reconstruction", "val/kl", "val/loss", "val/mse",
    }  # fmt: skip
    assert answers["extract"]["metrics"] == {"train/rows": 1298.0, "val/rows": 144.0, "test/rows": 355.0}
    assert answers["data pack"]["metrics"] == answers["extract"]["metrics"]
    assert answers["predict"]["metrics"] == {"rows": 1797.0}
    assert answers["reconstruct"]["metrics"].keys() == {
        "rows", "mse", "psnr", "reconstruction_nats", "bytes_per_sample", "input_bytes_per_sample",
    }  # fmt: skip


def test_outputs_have_names(answers):
    assert answers["pretrain"]["outputs"].keys() == {"run", "stage", "model", "recipe"}
    assert answers["finetune"]["outputs"].keys() == {"run", "stage", "model", "recipe"}
    assert answers["extract"]["outputs"].keys() == {"train", "val", "test"}
    assert answers["evaluate"]["outputs"].keys() == {"report", "confusion"}
    assert answers["predict"]["outputs"] == {"predictions": "p.parquet"}
    assert answers["sample"]["outputs"] == {"picture": "samples.png", "samples": "samples.npy"}
    assert answers["reconstruct"]["outputs"].keys() == {"data", "card", "scores", "picture"}
    assert answers["data pack"]["outputs"].keys() == {"data", "card"}


def test_what_is_no_number_is_null():
    from ssl_ae.stages.outcome import Outcome

    answer = Outcome("evaluate", None, metrics={"r2": math.nan, "rmse": math.inf}, more={"methods": {"a": {"r2": math.nan}}})
    text = json.dumps(answer.as_json(), allow_nan=False)
    assert json.loads(text)["metrics"] == {"r2": None, "rmse": None}
    assert json.loads(text)["methods"] == {"a": {"r2": None}}


def test_messages_go_to_stderr(recipe, here):
    answer = call("pretrain", recipe(), "--epochs", 1)
    assert answer.stdout.startswith("pretrain: done  runs/tiny/pretrain")
    assert len(answer.stdout.splitlines()) == 1
    assert "pretrain: 1,298 rows, 11 steps of 128" in answer.stderr


def test_other_ranks_are_silent(recipe, pretrained, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    answer = call("pretrain", recipe(), "--json")
    assert (answer.code, answer.stdout, answer.stderr) == (0, "", "")
