"""Heads that are fitted at once inside a stage: what they read, what they found out, and that every command predicts alike."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import call
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from ssl_ae_builtins.auto import NAMES, NETWORK

from ssl_ae.data.dataset import DataSet
from ssl_ae.stages.predict import Predictor

FITTED = [name for name in NAMES if name != NETWORK]
AUTO = {"model.head": {"name": "auto", "trees": 11}, "finetune.baselines": False}


def raw(digits, split):
    """Samples in [0, 1] and labels."""
    part = DataSet.open(digits)
    rows = np.arange(part.split(split).rows)
    return part.split(split).read(rows).reshape(len(rows), -1) / 16.0, part.labels(split)


def labelled(here, digits, known, weight=""):
    """labels.csv of some train rows."""
    keys, y = DataSet.open(digits).split("train").keys, raw(digits, "train")[1]
    lines = ["key,label" + (",weight" if weight else ""), *(f"{keys[row]},{y[row]}{weight}" for row in known)]
    (here / "labels.csv").write_text("\n".join(lines) + "\n")


def test_the_choice_is_told_stored_and_tracked(recipe, finetuned):
    answer = call("finetune", recipe(AUTO), "--json")
    stage = finetuned / "finetune" / answer.json["method"]
    metrics = json.loads((stage / "metrics.json").read_text())
    (taken,) = [name for name in FITTED if metrics[f"head/{name}/taken"]]
    for name in FITTED:
        assert 0 <= metrics[f"head/{name}/accuracy"] <= 1
        assert metrics[f"head/{name}/nll_se"] > 0
        (line,) = [line for line in answer.stderr.splitlines() if line.startswith(name.replace("-", " on "))]
        assert line.rstrip().endswith("taken") == (name == taken)
        assert f"{100 * metrics[f'head/{name}/accuracy']:.1f} ± {100 * metrics[f'head/{name}/accuracy_se']:.1f} %" in line
    assert f"head auto took {taken.replace('-', ' on ')}: " in answer.stderr
    lines = [json.loads(line) for line in (stage / "journal" / "rank-0.jsonl").read_text().splitlines()]
    (told,) = [line["values"] for line in lines if f"head/{taken}/taken" in line.get("values", {})]
    assert told == {name: value for name, value in metrics.items() if name.startswith("head/")}
    # done is done: the figures stay, nothing is fitted again
    again = call("finetune", recipe(AUTO), "--json").json
    assert (again["status"], again["metrics"]) == ("skipped", answer.json["metrics"])


def test_samples_reach_the_head_in_every_command(recipe, finetuned, here, digits):
    """Nine labels choose nothing, so the head is logistic regression on the pixels, whatever the latents are."""
    y = raw(digits, "train")[1]
    known = np.concatenate([np.flatnonzero(y == digit)[:3] for digit in (1, 4, 7)])
    labelled(here, digits, known)
    answer = call("finetune", recipe({**AUTO, "data.labels": "labels.csv"}), "--json").json
    assert any(warning.startswith("head auto keeps logistic on samples: 9 labels are too few") for warning in answer["warnings"])
    x, _ = raw(digits, "train")
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[known], y[known])
    x, truth = raw(digits, "test")
    found = call("evaluate", finetuned, "--split", "test", "--method", answer["method"], "--json").json["metrics"]
    assert found["accuracy"] == pytest.approx(theirs.score(x, truth))
    assert call("predict", finetuned, digits, "--method", answer["method"], "--out", "p.parquet").code == 0
    table = pq.read_table("p.parquet")
    p = np.stack([table[f"p_{digit}"].to_numpy() for digit in (1, 4, 7)], axis=1)[-len(x) :]  # test is the last split
    np.testing.assert_allclose(p, theirs.predict_proba(x), atol=1e-4)
    served = Predictor.load(finetuned / "finetune" / answer["method"], "cpu")  # what MLflow serves
    rows = DataSet.open(digits).split("test").read(np.arange(17))
    np.testing.assert_array_equal(served.predict(rows)["label"], table["label"].to_numpy(zero_copy_only=False)[-len(x) :][:17])


def test_weights_of_labels_are_not_used_and_it_says_so(recipe, finetuned, here, digits):
    labelled(here, digits, range(40), weight=",0.5")
    answer = call("finetune", recipe({**AUTO, "data.labels": "labels.csv"}), "--json").json
    assert "head builtins/auto takes every label as equally sure: the weights are not used." in answer["warnings"]


def test_it_is_refused_where_the_encoder_trains(recipe, finetuned):
    answer = call("finetune", recipe(AUTO), "--joint")
    assert answer.code == 2
    assert "model.head.name = builtins/auto: is fitted on stored latents" in answer.stderr
