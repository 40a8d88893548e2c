"""evaluate: what it reports of which methods, and what it compares them with."""

import json

import numpy as np
import pytest
from command_line import call
from safetensors.numpy import load_file

from ssl_ae.data.dataset import DataSet


def evaluate(run, *words):
    return call("evaluate", run, *words, "--json").json


def test_every_finished_method_is_reported_and_the_last_one_leads(finetuned):
    found = evaluate(finetuned)
    assert (found["split"], found["rows"]) == ("test", 355)
    assert found["methods"].keys() == {"sequential", "joint-alpha0.01"}
    assert found["method"] == "joint-alpha0.01"  # finetuned after sequential
    assert found["metrics"] == found["methods"]["joint-alpha0.01"]
    assert found["baselines"].keys() == {"labels-only", "pca-logistic"}
    for metrics in (*found["methods"].values(), *found["baselines"].values()):
        assert metrics.keys() == {"accuracy", "error", "nll", "ece"}
        assert metrics["error"] == pytest.approx(1 - metrics["accuracy"])


def test_one_may_be_named(finetuned):
    found = evaluate(finetuned, "--method", "sequential", "--split", "val")
    assert (found["method"], found["rows"]) == ("sequential", 144)
    assert found["metrics"] == found["methods"]["sequential"]


def test_the_figures_are_those_of_predict(finetuned, digits):
    """Accuracy and nll computed here from the table that `predict` writes."""
    import pyarrow.parquet as pq

    assert call("predict", finetuned, digits, "--out", "p.parquet", "--method", "sequential").code == 0
    table = pq.read_table("p.parquet").to_pydict()
    row_of = {key: row for row, key in enumerate(table["key"])}
    data = DataSet.open(digits)
    rows = [row_of[key] for key in data.split("test").keys]
    labels = data.labels("test")
    accuracy = np.mean([table["label"][row] == str(label) for row, label in zip(rows, labels, strict=True)])
    nll = -np.mean([np.log(table[f"p_{label}"][row]) for row, label in zip(rows, labels, strict=True)])
    metrics = evaluate(finetuned)["methods"]["sequential"]
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)


def test_the_linear_baseline_is_pca_and_logistic_regression(finetuned, digits):
    """By scikit-learn's own pipeline on the same 30 labels."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from ssl_ae.data.labels import draw

    data = DataSet.open(digits)
    train, test = (data.split(split).read(np.arange(data.split(split).rows)).reshape(-1, 64) / 16 for split in ("train", "test"))
    y = data.labels("train")
    chosen = draw(y, data.split("train").keys, names=data.card.y.names, seed=0, per_class=3)
    pca = PCA(5, whiten=True, random_state=0).fit(train)
    model = make_pipeline(LogisticRegression(max_iter=1000)).fit(pca.transform(train[chosen]), y[chosen])
    expected = model.score(pca.transform(test), data.labels("test"))
    assert evaluate(finetuned)["baselines"]["pca-logistic"]["accuracy"] == pytest.approx(expected, abs=1 / 355)


def test_the_comparison_is_with_the_same_labels(recipe, finetuned):
    """A method with 100 labels is not measured against baselines with 30."""
    assert call("finetune", recipe(), "--labels", 100).code == 0
    found = evaluate(finetuned, "--method", "joint-alpha0.01")
    warned = {warning.split(":")[0].removeprefix("the unlabelled data did not help ") for warning in found["warnings"]}
    assert len(found["methods"]) == 3
    assert warned <= {"sequential", "joint-alpha0.01"}


def test_what_it_leaves(finetuned):
    outputs = evaluate(finetuned, "--split", "val")["outputs"]
    folder = finetuned / "evaluate" / "val"
    assert outputs == {"report": str(folder / "metrics.json"), "confusion": str(folder / "figures" / "confusion_val.png")}
    assert json.loads((folder / "metrics.json").read_text())["methods"].keys() == {"sequential", "joint-alpha0.01"}


def test_nothing_learns_from_test(recipe, finetuned, here, digits):
    """A copy of the data whose test labels are all wrong gives the same models."""
    import shutil

    from ssl_ae.data.labels import LabelTable

    data = shutil.copytree(digits, here / "digits")
    opened = DataSet.open(data)
    table, test = opened.label_table, set(opened.split("test").keys)
    wrong = np.where([key in test for key in table.keys], (table.labels + 1) % 10, table.labels)
    LabelTable(table.keys, wrong).write(data / "labels.parquet")
    path = recipe({"data.path": str(data), "name": "lied-to"})
    for words in (["pretrain"], ["finetune"], ["finetune", "--joint"]):
        assert call(words[0], path, *words[1:]).code == 0
    for stage in ("pretrain", "finetune/sequential", "finetune/joint-alpha0.01"):
        ours, theirs = (load_file(run / stage / "model.safetensors") for run in (finetuned, here / "runs" / "lied-to"))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_without_a_test_split_the_figures_are_those_of_val(here):
    rows = "".join(f"{i % 7},{i % 11},{i % 2}\n" for i in range(97))
    (here / "table.csv").write_text("a,b,y\n" + rows)
    (here / "table.yaml").write_text(
        "name: table\ndata: {path: table, labels: all}\nmodel: {latent_dim: 2, encoder: {name: linear}, "
        "decoder: {name: linear, likelihood: gaussian}, head: {name: softmax}}\n"
        "pretrain: {epochs: 1}\nfinetune: {epochs: 1, baselines: false}\n"
    )
    assert call("data", "pack", "table.csv", "table", "--label", "y").code == 0
    answer = call("run", "table.yaml", "--json")
    assert (answer.code, answer.json["split"]) == (0, "val")
    assert "table has no test split: these are figures of val." in answer.stderr
