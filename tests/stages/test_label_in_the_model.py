"""A model that a label enters, through every stage and command: features are stored, samples come one of each class in turn."""

import numpy as np
from command_line import call
from pyarrow import parquet

from ssl_ae.data.dataset import DataSet

M2 = {
    "model.encoder": {"name": "conditional_mlp", "widths": [17], "classifier": [13]},
    "model.decoder": {"name": "conditional_mlp", "likelihood": "bernoulli"},
    "model.regularizers": [{"name": "kl"}, {"name": "label_kl"}],
    "pretrain.epochs": 1,
    "finetune": {"mode": "joint", "init": "scratch", "alpha": 10.0, "epochs": 1, "batch_size": 128, "baselines": False},
}


def test_every_stage_and_command(recipe, digits):
    path = recipe(M2)
    answer = call("run", path, "--out", "run", "--json")
    assert answer.code == 0, answer.stderr
    assert 0 < answer.json["metrics"]["accuracy"] <= 1
    assert "shows no picture" not in answer.stderr
    table = parquet.read_table("run/latents/val")
    assert table["latent"].type.list_size == 5
    assert "latent_std" not in table.column_names  # what is stored are features, and they are certain
    scored = call("extract", "run", "--split", "val", "--scores", "--json")
    assert scored.code == 0, scored.stderr
    assert np.isfinite(parquet.read_table("run/latents/val")["reconstruction_nats"].to_numpy()).all()
    for words in (
        ["evaluate", "run"],
        ["predict", "run", digits, "--out", "found.parquet"],
        ["reconstruct", "run", digits, "--out", "rebuilt"],
        ["sample", "run", "--n", 20, "--out", "sheet.png"],
    ):
        answer = call(*words, "--json")
        assert answer.code == 0, (words, answer.stderr)
    for words in (
        ["reconstruct", "run", digits, "--out", "bounds", "--draws", 3],
        ["sample", "run", "--traverse", 1, "--out", "no.png"],
        ["sample", "run", "--prior", "mixture", "--out", "no.png"],
    ):
        refused = call(*words)
        assert refused.code == 2
        assert "label" in refused.stderr, refused.stderr


def test_latents_of_a_run_are_packed_and_trained_on(recipe):
    """M1 + M2: the second recipe names the first one's latents as its source (Kingma et al. 2014, sec. 3.1.3)."""
    assert call("pretrain", recipe({"pretrain.epochs": 1}), "--out", "m1").code == 0
    assert call("extract", "m1").code == 0
    second = {**M2, "name": "m1m2", "data.path": "codes", "data.source": "m1/latents", "data.scale": "none"}
    second["model.decoder"] = {"name": "conditional_mlp", "variance": "feature"}
    answer = call("finetune", recipe(second, "second.yaml"), "--out", "m1m2", "--json")
    assert answer.code == 0, answer.stderr
    assert DataSet.open("codes").card.splits["val"].rows == 144


def test_a_head_that_is_fitted_at_once_stands_on_the_features(recipe):
    """It is not asked for q(y|x) before it was fitted."""
    path = recipe(M2 | {"model.head": {"name": "logistic"}, "finetune": {"baselines": False}})
    assert call("pretrain", path, "--out", "run").code == 0
    answer = call("finetune", path, "--out", "run", "--json")
    assert answer.code == 0, answer.stderr
    assert 0 < answer.json["metrics"]["val/accuracy"] <= 1
