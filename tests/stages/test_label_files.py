"""A method is judged by the labels it learnt from, whatever becomes of the file that they came in."""

import csv
import json

import numpy as np
import pytest
from command_line import call

from ssl_ae import tables
from ssl_ae.data.labels import LabelTable

ROWS = 97


@pytest.fixture
def truth(here) -> dict[str, int]:
    """Vectors that are packed without labels, and which of two clusters each key is of."""
    random = np.random.default_rng(0)
    cluster = random.integers(0, 2, ROWS)
    x = (random.normal(size=(ROWS, 5)) + 3 * cluster[:, None]).astype(np.float32)
    np.savez("x.npz", x_train=x[:67], x_val=x[67:])
    assert call("data", "pack", "x.npz", "vectors").code == 0
    recipe = {
        "name": "tiny",
        "data": {"path": "vectors"},
        "model": {"latent_dim": 3, "encoder": {"name": "linear"}, "decoder": {"name": "linear"}, "head": {"name": "logistic"}},
        "pretrain": {"epochs": 3},
        "device": "cpu",
    }
    (here / "recipe.yaml").write_text(json.dumps(recipe))
    keys = [f"train-{i:08d}" for i in range(67)] + [f"val-{i:08d}" for i in range(30)]
    return dict(zip(keys, cluster.tolist(), strict=True))


def write(path, truth, names, more=()):
    """A label file of these rows under these names of the two clusters."""
    path.write_text("\n".join(["key,label", *(f"{key},{names[cluster]}" for key, cluster in truth.items()), *more]) + "\n")


def run(*words):
    said = call("run", "recipe.yaml", "--labels", "labels.csv", *words, "--json")
    assert said.code == 0, said.stderr
    return said


def evaluated(*words):
    said = call("evaluate", "runs/tiny", *words, "--json")
    assert said.code == 0, said.stderr
    return said


def test_later_names_in_the_file_are_not_those_that_it_learnt(truth, here):
    write(here / "labels.csv", truth, ["cat", "dog"])
    run()
    before = evaluated().json
    write(here / "labels.csv", truth, ["wolf", "dog"])  # in the order of letters the two classes have changed places
    assert evaluated().json["metrics"] == before["metrics"]
    (here / "labels.csv").unlink()
    assert evaluated().json["metrics"] == before["metrics"]
    assert call("suggest", "runs/tiny", "--budget", 3, "--out", "sheet.csv").code == 2  # every row of train has a label
    (here / "runs/tiny").rename(here / "runs/moved")  # the copy goes with the run
    assert call("evaluate", "runs/moved", "--json").json["metrics"] == before["metrics"]


def test_other_names_are_another_method(truth, here):
    write(here / "labels.csv", truth, ["bird", "carr"])
    assert [run().json["status"] for _ in range(2)] == ["done", "skipped"]
    write(here / "labels.csv", truth, ["bird", "car"])
    assert run().json["status"] == "done"
    assert len(list((here / "runs/tiny/finetune").iterdir())) == 2
    assert call("predict", "runs/tiny", "vectors", "--out", "p.parquet").code == 0
    assert set(tables.read_parquet(here / "p.parquet").columns["label"]) == {"bird", "car"}


def test_each_method_is_compared_with_its_own_labels(truth, here):
    few = {key: truth[key] for place, key in enumerate(truth) if place % 5 == 0}
    write(here / "labels.csv", few, ["cat", "dog"])
    run()
    before = evaluated("--method", "sequential").json
    write(here / "labels.csv", truth, ["cat", "dog"])
    run()
    after = evaluated("--method", "sequential").json
    assert before["baselines"].keys() == {"pca-logistic"}
    assert after["baselines"] == before["baselines"]
    assert after["metrics"] == before["metrics"]


def test_a_sheet_has_labels_of_other_splits_and_guesses_below(truth, here):
    some = {key: truth[key] for place, key in enumerate(truth) if place % 3 == 0}
    rows = [
        f"{key},{'cat' if cluster else 'dog'},{'' if place % 2 else 0.75}" for place, (key, cluster) in enumerate(some.items())
    ]
    (here / "labels.csv").write_text("\n".join(["key,label,probability", *rows]) + "\n")
    run()
    said = call("suggest", "runs/tiny", "--budget", 7, "--out", "sheet.csv", "--json")
    assert said.json["metrics"]["labeled"] == len(some)
    with open("sheet.csv", newline="") as file:
        sheet = list(csv.DictReader(file))
    assert all(not row["label"] and not row["probability"] and row["key"].startswith("train") for row in sheet[:7])
    told, given = LabelTable.read(here / "sheet.csv").labeled(), LabelTable.read(here / "labels.csv")
    assert told.keys.tolist() == given.keys.tolist() == list(some)
    assert told.labels.tolist() == given.labels.tolist()
    np.testing.assert_array_equal(told.probability, given.probability)
    assert told.without_guesses().keys.tolist() == list(some)[1::2]


def test_the_first_sheet_knows_the_labels_that_were_added_since(truth, here):
    """Pretraining learns from no label, so the file may grow, or not be there yet."""
    packed = [*truth.items()]
    write(here / "labels.csv", dict(packed[:11]), ["cat", "dog"])
    assert call("run", "recipe.yaml", "--labels", "labels.csv", "--set", "stages=[pretrain, extract]").code == 0
    write(here / "labels.csv", dict(packed[:31]), ["cat", "dog"])
    assert call("suggest", "runs/tiny", "--budget", 3, "--out", "sheet.csv", "--json").json["metrics"]["labeled"] == 31


def test_pretraining_does_not_wait_for_the_labels(recipe, here):
    path = recipe({"data.labels": "later.csv", "pretrain.epochs": 1})
    assert call("pretrain", path).code == 0
    assert "later.csv" in call("finetune", path).stderr


def test_labels_that_weigh_nothing_are_refused(truth, here):
    rows = [f"{key},{cluster},0" for key, cluster in truth.items()]
    (here / "labels.csv").write_text("\n".join(["key,label,weight", *rows]) + "\n")
    said = call("run", "recipe.yaml", "--labels", "labels.csv")
    assert said.code == 2
    assert "labels.csv: every label of a train row has weight 0" in said.stderr
