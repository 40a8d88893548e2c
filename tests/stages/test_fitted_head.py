"""Heads that are fitted at once inside a stage: what they read, what they found out, and that every command predicts alike."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import call, one_line
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from ssl_ae_builtins import auto, selection
from ssl_ae_builtins.auto import NAMES, NETWORK
from ssl_ae_builtins.image_spreading import ImageLabelSpreading

from ssl_ae import latents
from ssl_ae.data.dataset import DataSet
from ssl_ae.stages import fitted_head, rival
from ssl_ae.stages.predict import Predictor
from ssl_ae.stages.training_run import train
from ssl_ae.trace import Shapes

FITTED = [name for name in NAMES if name != NETWORK]
AUTO = {"model.head": {"name": "auto", "trees": 11, "network_steps": 20}, "finetune.baselines": False}


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


def test_a_head_that_compares_samples_gets_those_of_all_rows(recipe, finetuned, here, digits, monkeypatch):
    """Scaled as the encoder sees them and in the order of the latents, however many are read at a time."""
    monkeypatch.setattr(fitted_head, "BATCH_ROWS", 101)
    options = {"beside": "samples", "sharpen": 3}
    head = {"name": "image_label_spreading", **options}
    labelled(here, digits, range(40))
    changes = {"model.head": head, "finetune.baselines": False, "data.labels": "labels.csv"}
    answer = call("finetune", recipe(changes), "--json").json
    stored = load_file(finetuned / "finetune" / answer["method"] / "model.safetensors")["head.p"]
    x, y = raw(digits, "train")
    z = latents.read(finetuned / "latents" / "train").z
    shapes = Shapes(x=(1, 8, 8), latent=z.shape[1], classes=10, targets=None)
    alone = ImageLabelSpreading(ImageLabelSpreading.Config(**options), shapes)
    y = np.where(np.arange(len(y)) < 40, y, -1)
    alone.fit(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(x).float())
    np.testing.assert_allclose(stored, alone.p, atol=1e-5)
    found = call("evaluate", finetuned, "--split", "test", "--method", answer["method"], "--json").json["metrics"]
    z, truth = latents.read(finetuned / "latents" / "test").z, raw(digits, "test")[1]
    assert found["accuracy"] == pytest.approx((alone.predict(torch.from_numpy(z)).probs.argmax(1).numpy() == truth).mean())


def test_weights_of_labels_are_not_used_and_it_says_so(recipe, finetuned, here, digits):
    labelled(here, digits, range(40), weight=",0.5")
    answer = call("finetune", recipe({**AUTO, "data.labels": "labels.csv"}), "--json").json
    assert "head builtins/auto takes every label as equally sure: the weights are not used." in answer["warnings"]


def test_it_is_refused_where_the_encoder_trains(recipe, finetuned):
    answer = call("finetune", recipe(AUTO), "--joint")
    assert answer.code == 2
    assert "model.head.name = builtins/auto: is fitted on stored latents" in answer.stderr


# --- with the finetuned network among the candidates

WITH_NETWORK = {
    **AUTO,
    "model.head": {"name": "auto", "trees": 2, "repeats": 1, "network_steps": 60},
    "data.labels": "labels.csv",
}


@pytest.fixture
def network_wins(monkeypatch):
    """Whatever the labels say; the folds are fixed. Returns what was held out, a dict a fit."""
    seen = []

    def choose(held_out, y):
        seen.append(held_out)
        return dataclasses.replace(selection.choose(held_out, y), taken=NETWORK)

    monkeypatch.setattr(auto, "choose", choose)
    monkeypatch.setattr(auto, "stratified", lambda y, folds, repeats: (torch.arange(len(y)) % folds)[None])
    return seen


def test_a_network_that_wins_becomes_the_model(recipe, finetuned, here, digits, network_wins):
    known = range(40)
    labelled(here, digits, known)
    answer = call("finetune", recipe({**WITH_NETWORK, "finetune.optimizer": {"lr": 0.03}}), "--json").json
    stage = finetuned / "finetune" / answer["method"]
    weights, before = load_file(stage / "model.safetensors"), load_file(finetuned / "pretrain" / "model.safetensors")
    assert {name.split(".")[0] for name in before if not np.array_equal(weights[name], before[name])} == {"encoder"}
    assert any(metric.startswith(f"head/{NETWORK}/") for metric in answer["metrics"])
    # p(y|x) is the softmax of W z + b on the latents of the encoder that is stored
    served = Predictor.load(stage, "cpu")
    rows = DataSet.open(digits).split("train").read(np.arange(40))
    with torch.no_grad():
        z = served.model.features(served.scaling(torch.from_numpy(rows)))
    w, b = (torch.from_numpy(weights[f"head.candidates.{NETWORK}.{name}"]) for name in ("weight", "bias"))
    found = served.predict(rows)
    p = torch.from_numpy(np.stack([found[f"p_{digit}"] for digit in range(10)], axis=1))
    torch.testing.assert_close(p, (z @ w.T + b).softmax(1), atol=2e-5, rtol=0)
    # it has learned the labels, which a linear head on the latents of two epochs had not
    hits = p.argmax(1).numpy() == raw(digits, "train")[1][known]
    assert hits.mean() > 0.9


def test_each_training_makes_as_many_steps_as_it_is_told(recipe, finetuned, here, digits, network_wins, monkeypatch):
    """One a fold and one to keep, whatever `finetune.epochs` of 1,298 rows would be."""
    steps = []
    monkeypatch.setattr(
        rival, "train", lambda ws, model, plan, *how, **more: steps.append(plan.steps) or train(ws, model, plan, *how, **more)
    )
    labelled(here, digits, range(40))
    fields = {**WITH_NETWORK, "model.head": {**WITH_NETWORK["model.head"], "network_steps": 7}, "finetune.epochs": 3}
    assert call("finetune", recipe(fields)).code == 0
    assert steps == [7] * 6


def test_a_network_does_not_see_what_is_held_out(recipe, finetuned, here, digits, network_wins):
    labelled(here, digits, range(40))
    path = recipe(WITH_NETWORK)
    assert call("finetune", path).code == 0
    # the rows of fold 3 of 5 get other labels
    keys, y = DataSet.open(digits).split("train").keys, raw(digits, "train")[1]
    lines = [f"{keys[row]},{(y[row] + (row % 5 == 3)) % 10}" for row in range(40)]
    (here / "labels.csv").write_text("\n".join(["key,label", *lines]) + "\n")
    assert call("finetune", path).code == 0
    first, second = (held_out[NETWORK][0] for held_out in network_wins)
    at = torch.arange(40) % 5 == 3
    torch.testing.assert_close(first[at], second[at], atol=1e-5, rtol=0)
    assert not torch.allclose(first[~at], second[~at], atol=1e-3)
    torch.testing.assert_close(first.sum(1), torch.ones(40))


CONSTANT_CODES = {
    "model.encoder": {"name": "sparse_coding"},
    "model.decoder": {"name": "linear"},
    "model.regularizers": [{"name": "sparse_l1"}],
    "finetune.baselines": False,
}


def test_labels_cannot_train_every_encoder(recipe):
    path = recipe({**CONSTANT_CODES, "model.head": {"name": "auto", "network": True}})
    assert "model.head.network = true: the code of encoder builtins/sparse_coding is a constant of each step" in one_line(
        "finetune", path
    )


def test_where_labels_cannot_train_the_encoder_no_network_competes(recipe, here):
    path = recipe({**CONSTANT_CODES, "pretrain.epochs": 1, "model.head": {"name": "auto", "trees": 2, "repeats": 1}})
    assert call("pretrain", path).code == 0
    answer = call("finetune", path, "--json").json
    assert not any(metric.startswith(f"head/{NETWORK}/") for metric in answer["metrics"])
    assert "head/logistic-samples/brier" in answer["metrics"]
