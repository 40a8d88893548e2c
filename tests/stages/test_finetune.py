"""finetune: every mode and kind of head, which folder it goes to, and what each mode may change."""

import csv
import json
import shutil

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from command_line import call, snapshot
from PIL import Image
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_ae.data.dataset import DataSet


def weights(stage, part=""):
    return {name: value for name, value in load_file(stage / "model.safetensors").items() if name.startswith(part)}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_run_folder(finetuned):
    stage = finetuned / "finetune" / "joint-alpha0.01"
    assert {path.name for path in stage.iterdir()} == {
        "checkpoint", "figures", "journal", "card.json", "metrics.json", "model.safetensors", "recipe.yaml", "stage.json",
    }  # fmt: skip
    figures = {"learning_curves.png", "confusion_val.png", "latent_map.png"}
    assert {path.name for path in (stage / "figures").iterdir()} == figures
    (baselines,) = (finetuned / "baselines").iterdir()  # both modes compare with the same ones
    assert {path.name for path in baselines.iterdir()} == {"labels-only.safetensors", "pca-logistic.safetensors"}


def test_sequential_leaves_the_autoencoder_as_it_was(finetuned):
    ours = weights(finetuned / "finetune" / "sequential")
    assert same({name: value for name, value in ours.items() if not name.startswith("head.")}, weights(finetuned / "pretrain"))
    assert any(name.startswith("head.") for name in ours)


def test_joint_trains_encoder_and_decoder(finetuned):
    for part in ("encoder.", "decoder."):
        assert not same(weights(finetuned / "finetune" / "joint-alpha0.01", part), weights(finetuned / "pretrain", part))


@pytest.mark.parametrize(("mode", "decoder_stays"), [("alternate", False), ("end-to-end", True)])
def test_the_other_modes(recipe, finetuned, mode, decoder_stays):
    answer = call("finetune", recipe(), f"--{mode}", "--json").json
    stage = finetuned / "finetune" / mode
    assert answer["outputs"]["stage"] == f"runs/tiny/finetune/{mode}"
    assert not same(weights(stage, "encoder."), weights(finetuned / "pretrain", "encoder."))
    assert same(weights(stage, "decoder."), weights(finetuned / "pretrain", "decoder.")) == decoder_stays


def test_missing_latents_are_extracted_aloud(recipe, pretrained):
    answer = call("finetune", recipe())
    assert answer.code == 0
    assert "extract: 1,298 rows of train into runs/tiny/latents/train" in answer.stderr
    assert "extract: 144 rows of val into runs/tiny/latents/val" in answer.stderr
    assert not (pretrained / "latents" / "test").exists()  # nothing is ever chosen by looking at test


def test_joint_needs_no_latents(recipe, pretrained):
    assert call("finetune", recipe(), "--joint").code == 0
    assert not (pretrained / "latents").exists()


def test_a_finished_one_is_skipped(recipe, finetuned):
    before = snapshot(finetuned)
    answer = call("finetune", recipe(), "--json").json
    assert (answer["status"], answer["method"]) == ("skipped", "sequential")
    assert snapshot(finetuned) == before


def test_other_labels_go_beside(recipe, finetuned):
    before = snapshot(finetuned / "finetune")
    answer = call("finetune", recipe(), "--labels", 100, "--json").json
    stage = finetuned / "finetune" / answer["method"]
    fingerprint = json.loads((stage / "stage.json").read_text())["fingerprint"]
    assert answer["method"] == f"sequential-{fingerprint[:8]}"
    assert before.items() <= snapshot(finetuned / "finetune").items()
    again = call("finetune", recipe(), "--labels", 100, "--json").json
    assert (again["status"], again["method"]) == ("skipped", answer["method"])
    other = call("finetune", recipe(), "--labels", 100, "--set", "data.labels.seed=1", "--json").json
    assert other["method"] not in (answer["method"], "sequential")


def test_another_alpha_has_a_folder_of_its_own(recipe, finetuned):
    assert call("finetune", recipe(), "--joint", "--alpha", "0.5", "--json").json["method"] == "joint-alpha0.5"


def test_restart_makes_it_anew(recipe, finetuned):
    stage = finetuned / "finetune" / "sequential"
    before = weights(stage)
    (stage / "stray").write_text("")
    assert call("finetune", recipe(), "--restart", "--json").json["status"] == "done"
    assert not (stage / "stray").exists()
    assert same(weights(stage), before)


def test_from_another_run(recipe, pretrained, here):
    """Weights and latents come from there, the head goes to --out."""
    before = snapshot(pretrained)
    answer = call("finetune", recipe(), "--from", pretrained, "--out", "runs/other", "--json").json
    assert answer["run"] == "runs/other"
    assert same(weights(here / "runs/other/finetune/sequential", "encoder."), weights(pretrained / "pretrain", "encoder."))
    assert not (here / "runs/other/latents").exists()
    assert {path.name for path in (pretrained / "latents").iterdir()} >= {"train", "val"}
    after = snapshot(pretrained)
    assert [name for name in before if after.get(name) != before[name] and not name.startswith("journal")] == []
    assert call("evaluate", "runs/other").code == 0


def test_from_a_run_without_the_terms_of_finetuning(recipe, pretrained):
    """The running mean of classes that alignment keeps is none of a pretrained autoencoder's weights."""
    terms = [{"name": "consistency", "threshold": 0.1, "align": True}]
    fields = {"name": "consistent", "model.regularizers": terms, "finetune.ema": 0.9, "finetune.baselines": False}
    answer = call("finetune", recipe(fields), "--from", pretrained, "--out", "runs/consistent", "--end-to-end", "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["metrics"]["train/consistency"] > 0
    assert call("evaluate", "runs/consistent").code == 0


def test_from_alone_writes_into_that_run(recipe, pretrained):
    answer = call("finetune", recipe({"name": "renamed"}), "--from", pretrained, "--json").json
    assert answer["outputs"]["stage"] == str(pretrained / "finetune" / "sequential")


def test_from_a_run_in_use(recipe, pretrained, here):
    from ssl_ae.runs import lock

    with lock(pretrained):
        answer = call("finetune", recipe(), "--from", pretrained, "--out", "runs/other")
    assert answer.code == 2
    assert "is in use by process" in answer.stderr
    assert not (here / "runs" / "other").exists()


def test_from_scratch_needs_no_pretrained_run(recipe, here):
    answer = call("finetune", recipe({"finetune.init": "scratch"}), "--joint", "--json").json
    assert answer["outputs"]["stage"] == "runs/tiny/finetune/joint-alpha0.01"
    assert not (here / "runs/tiny/pretrain").exists()
    assert call("evaluate", "runs/tiny", "--json").json["method"] == "joint-alpha0.01"


@pytest.mark.parametrize("head", ["logistic", "knn"])
def test_table_heads(recipe, finetuned, digits, head):
    answer = call("finetune", recipe({"model.head": {"name": head}, "data.labels": "all"}), "--json").json
    metrics = call("evaluate", finetuned, "--split", "val", "--method", answer["method"], "--json").json["metrics"]
    assert metrics["accuracy"] > 0.3  # chance is 0.1; the code of 2 epochs is a poor one
    # scikit-learn on the stored latents says the same
    tables = {split: pyarrow.dataset.dataset(finetuned / "latents" / split).to_table() for split in ("train", "val")}
    z = {split: np.stack(table["latent"].to_numpy()) for split, table in tables.items()}
    y = {split: table["label"].to_numpy() for split, table in tables.items()}
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    reference = {"logistic": logistic, "knn": KNeighborsClassifier(5)}[head].fit(z["train"], y["train"])
    assert metrics["accuracy"] == pytest.approx(reference.score(z["val"], y["val"]), abs=1 / 144)  # one row of rounding
    # the labels-only network has a head of that kind nowhere to train, PCA + logistic regression always is there
    assert {name for name in answer["metrics"] if name.endswith("/accuracy")} == {"val/accuracy", "val/pca-logistic/accuracy"}


def test_regression_on_a_table(recipe, here):
    """y = 2 a - b + noise of 0.1: a linear head on enough labels explains nearly all of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(701, 3))
    y = 2 * x[:, 0] - x[:, 1] + 0.1 * rng.normal(size=701)
    with open(here / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "a", "b", "c", "y"])
        writer.writerows([f"row{i}", *row, target] for i, (row, target) in enumerate(zip(x.tolist(), y.tolist(), strict=True)))
    assert call("data", "pack", "table.csv", "table", "--label", "y", "--key", "id").code == 0
    path = recipe(
        {
            "data.path": "table",
            "data.labels": {"total": 211},
            "model.latent_dim": 3,
            "model.encoder": {"name": "linear"},
            "model.decoder": {"name": "linear"},
            "model.regularizers": [],
            "model.head": {"name": "gaussian"},
            "pretrain": {"epochs": 40, "batch_size": 64, "optimizer": {"lr": 0.01}},
            "finetune": {"epochs": 60, "batch_size": 64, "optimizer": {"lr": 0.03}},
        }
    )
    for command in ("pretrain", "finetune"):
        assert call(command, path).code == 0
    assert call("finetune", path, "--joint").code == 0
    found = call("evaluate", "runs/tiny", "--split", "val", "--json").json
    assert found["metrics"].keys() == {"rmse", "mae", "r2"}
    for metrics in (*found["methods"].values(), found["baselines"]["pca-logistic"]):
        assert metrics["r2"] > 0.9
    schema = pq.read_schema(here / "runs/tiny/latents/train/part-00000.parquet")
    assert str(schema.field("label").type).startswith("fixed_size_list<")
    assert call("predict", "runs/tiny", "table", "--out", "p.parquet").code == 0
    predictions = pq.read_table(here / "p.parquet")
    assert predictions.column_names == ["key", "y", "reconstruction_nats"]
    targets = dict(zip([f"row{i}" for i in range(701)], y, strict=True))
    errors = predictions["y"].to_numpy() - np.array([targets[key] for key in predictions["key"].to_pylist()])
    assert np.sqrt(np.mean(errors**2)) < 0.5  # the targets' deviation is sqrt(5)


def test_targets_below_zero_are_labels_too(recipe, here):
    x = np.random.default_rng(0).normal(size=(101, 2))
    with open(here / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "y"], *([*row, -7 - row[0]] for row in x.tolist())])
    assert call("data", "pack", "table.csv", "table", "--label", "y", "--task", "regression").code == 0
    path = recipe(
        {"data.path": "table", "data.labels": "all", "model.decoder.likelihood": "gaussian", "model.head.name": "gaussian"}
    )
    assert call("pretrain", path).code == 0
    assert call("finetune", path).code == 0
    assert call("evaluate", "runs/tiny", "--split", "val").code == 0


@pytest.fixture
def photos(here, digits):
    """100 digits as PNG files in one folder, so without labels; and the labels in a file of their own."""
    data = DataSet.open(digits)
    x, labels = data.split("train").read(np.arange(100)), data.labels("train")[:100]
    (here / "photos").mkdir()
    for i in range(100):
        Image.fromarray(x[i, 0] * 15).save(here / "photos" / f"{i:03d}.png")
    with open(here / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["key", "label"], *([f"{i:03d}", f"digit {labels[i]}"] for i in range(100))])
    return here / "photos"


def test_images_without_labels_and_a_file_of_labels(recipe, here, photos):
    assert call("data", "pack", "photos", "packed").code == 0
    path = recipe({"data.path": "packed", "data.labels": "labels.csv"})
    assert call("pretrain", recipe({"data.path": "packed", "data.labels": "all"}, "before.yaml")).code == 0
    answer = call("finetune", path)
    assert "finetune sequential: 90 labels of 90 train rows" in answer.stderr
    assert call("finetune", path, "--joint", "--labels", "labels.csv").code == 0
    assert call("predict", "runs/tiny", "photos", "--out", "p.parquet").code == 0
    assert set(pq.read_table("p.parquet")["label"].to_pylist()) <= {f"digit {i}" for i in range(10)}


def test_such_a_run_is_judged_by_the_labels_of_the_file(recipe, here, photos, monkeypatch):
    """Wherever the command is started from: a stored recipe holds absolute paths."""
    assert call("data", "pack", "photos", "packed").code == 0
    path = recipe({"data.path": "packed", "data.labels": "labels.csv"})
    assert call("pretrain", recipe({"data.path": "packed", "data.labels": "all"}, "before.yaml")).code == 0
    assert call("finetune", path).code == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    found = call("evaluate", "../runs/tiny", "--split", "val", "--json").json
    assert (found["rows"], found["metrics"].keys()) == (10, {"accuracy", "error", "nll", "ece"})


def test_terms_that_sequential_training_leaves_out_are_named(recipe):
    path = recipe({"model.regularizers": [{"name": "kl"}, {"name": "vat"}], "finetune.baselines": False})
    assert call("pretrain", path, "--epochs", 1).code == 0
    answer = call("finetune", path, "--json", "--epochs", 1)
    (warning,) = answer.json["warnings"]
    assert "sequential training leaves out what is of predictions: vat. Add --joint or --end-to-end." in warning


def test_it_says_where_unlabelled_data_did_not_help(finetuned, recipe):
    """A head on the code of 2 epochs is worse than PCA with the same 30 labels, and the user is told so."""
    answer = call("finetune", recipe(), "--restart", "--json")
    metrics = answer.json["metrics"]
    assert metrics["val/accuracy"] < metrics["val/pca-logistic/accuracy"]
    (warning,) = answer.json["warnings"]
    assert warning.startswith("the unlabelled data did not help sequential: its accuracy on val, ")
    assert f"warning: {warning}" in answer.stderr
    for name in ("sequential", "labels-only (no unlabelled data)", "pca-logistic (no network)"):
        assert name in answer.stderr


def test_without_baselines(recipe, pretrained):
    metrics = call("finetune", recipe({"finetune.baselines": False}), "--json").json["metrics"]
    assert not [name for name in metrics if "logistic" in name or "labels-only" in name]
    assert not (pretrained / "baselines").exists()


def test_a_copy_elsewhere_has_the_same_bytes(recipe, finetuned, here):
    shutil.copytree(finetuned, here / "elsewhere")
    shutil.rmtree(here / "elsewhere" / "finetune")
    for words in ([], ["--joint"]):
        assert call("finetune", recipe(), *words, "--out", "elsewhere").code == 0
    for method in ("sequential", "joint-alpha0.01"):
        model = f"finetune/{method}/model.safetensors"
        assert (here / "elsewhere" / model).read_bytes() == (finetuned / model).read_bytes()


def test_the_labels_only_network_stops_early_too(recipe, here):
    """The comparison is fair when both may stop; without a decoder it watches its own loss."""
    fields = {
        "finetune.epochs": 4,
        "finetune.init": "scratch",
        "finetune.early_stopping": {"metric": "val/reconstruction", "patience": 1},
        "finetune.optimizer": {"name": "sgd", "lr": 1e-12},  # nothing moves: no epoch is better than the first
    }
    answer = call("finetune", recipe(fields), "--joint", "--json")
    assert answer.code == 0
    assert "val/labels-only/accuracy" in answer.json["metrics"]
    assert "baseline labels-only: epoch 2/4" in answer.stderr or "baseline labels-only: epoch 1/4" in answer.stderr
    assert "baseline labels-only: epoch 4/4" not in answer.stderr
