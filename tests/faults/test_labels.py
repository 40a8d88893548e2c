"""Labels that are few, odd or wrong: a right answer or one message that says what is wrong with which row."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call, one_line, refused

from ssl_ae.data.dataset import DataSet

HEADS = ["softmax", "mlp", "logistic", "knn", "label_spreading"]
FEW = 4  # labels a class


@pytest.fixture
def known(digits) -> dict[int, list[str]]:
    """The first train keys of each class."""
    data = DataSet.open(digits)
    keys, y = data.split("train").keys, data.labels("train")
    return {c: keys[np.flatnonzero(y == c)[:FEW]].tolist() for c in range(10)}


@pytest.fixture
def labels(here, known):
    """Writes labels.csv of some classes: {class: what stands for it}."""

    def write(meaning: dict[int, object], more: str = "") -> Path:
        rows = [f"{key},{text}\n" for c, text in meaning.items() for key in known[c]]
        (here / "labels.csv").write_text("key,label\n" + "".join(rows) + more)
        return here / "labels.csv"

    return write


def finetune(recipe, *words: object) -> dict:
    return call("finetune", recipe({"finetune.epochs": 1}), "--labels", "labels.csv", *words, "--json").json


ALL = {c: c for c in range(10)}


# --- fewer labels than a classifier hopes for


def test_classes_without_labels_are_named_and_the_rest_is_judged(recipe, finetuned, labels):
    labels({c: c for c in ALL if c not in (3, 7)})
    answer = finetune(recipe)
    assert "no train row has a label of class '3' and '7': such samples will be taken for others." in answer["warnings"]
    found = call("evaluate", finetuned, "--split", "test", "--method", answer["method"], "--json").json
    assert found["rows"] == 355  # rows of the classes that nobody saw count too
    for scores in (found["metrics"], *found["baselines"].values()):
        assert 0 <= scores["accuracy"] < 0.9  # a fifth of the rows cannot be right
        assert scores["accuracy"] + scores["error"] == pytest.approx(1)


def test_no_baseline_predicts_a_class_that_it_never_saw(recipe, finetuned, labels, digits):
    labels({4: 4, 9: 9})
    answer = finetune(recipe, "--set", "model.head={name: logistic}")
    assert call("predict", finetuned, digits, "--method", answer["method"], "--out", "p.parquet").code == 0
    table = pq.read_table("p.parquet")
    assert set(table["label"].to_pylist()) == {"4", "9"}
    assert sum(sum(table[f"p_{c}"].to_pylist()) for c in range(10) if c not in (4, 9)) == 0
    assert table.num_rows == 1797


@pytest.mark.slow
@pytest.mark.parametrize("classes", [[3], [0, 8], list(range(9))], ids=["one", "two", "all but one"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_on_some_classes(recipe, finetuned, labels, digits, head, classes):
    labels({c: c for c in classes})
    answer = finetune(recipe, "--set", f"model.head={{name: {head}}}")
    assert 0 <= answer["metrics"]["val/accuracy"] <= 1
    found = call("evaluate", finetuned, "--split", "test", "--method", answer["method"], "--json").json["metrics"]
    assert 0 <= found["accuracy"] <= 1
    assert call("predict", finetuned, digits, "--method", answer["method"], "--out", "p.parquet").code == 0
    table = pq.read_table("p.parquet")
    assert sum(np.array(table[f"p_{c}"].to_pylist()) for c in range(10)) == pytest.approx(np.ones(1797), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [[3], list(range(9))], ids=["one", "all but one"])
@pytest.mark.parametrize("words", [["--joint"], ["--alternate"], ["--end-to-end"], ["--set", "finetune.solver.name=lbfgs"]])
def test_every_mode_on_some_classes(recipe, finetuned, labels, words, classes):
    labels({c: c for c in classes})
    metrics = finetune(recipe, *words)["metrics"]
    assert 0 <= metrics["val/accuracy"] <= 1
    assert math.isfinite(metrics["val/supervised"])


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_one_label_in_all(recipe, finetuned, here, known, head):
    (here / "labels.csv").write_text(f"key,label\n{known[5][0]},5\n")
    assert finetune(recipe, "--set", f"model.head={{name: {head}}}")["status"] == "done"


@pytest.mark.parametrize("nothing", ["", "-1", "nan", "NaN", None])
def test_nobody_has_a_label(recipe, finetuned, labels, nothing):
    labels({} if nothing is None else dict.fromkeys(ALL, nothing))
    assert "has a label, and finetune needs some." in one_line("finetune", recipe(), "--labels", "labels.csv")


def test_labels_of_validation_rows_alone_teach_nothing(recipe, finetuned, here, digits):
    keys = DataSet.open(digits).split("val").keys[:9]
    (here / "labels.csv").write_text("key,label\n" + "".join(f"{key},1\n" for key in keys))
    assert "no row of the train split" in one_line("finetune", recipe(), "--labels", "labels.csv")


# --- cells


@pytest.mark.parametrize("cell", ["10", "-2", "0.5", "1e0", "inf", "-inf", "True", "owl", "3 4", "1" * 400, "３three"])
def test_a_cell_that_is_no_class_is_named_with_its_row(recipe, finetuned, labels, known, cell):
    labels(ALL, f"{known[0][0]}x,{cell}\n")
    message = one_line("finetune", recipe(), "--labels", "labels.csv")
    assert f"labels.csv: row {10 * FEW + 1}: label {cell!r} is not a class of this data set" in message


@pytest.mark.parametrize(
    ("column", "row"),
    [
        (pa.array([0.0, 3.0, 2.5]), 3),
        (pa.array([0.0, math.inf, 1.0]), 2),
        (pa.array([0, 10, 1]), 2),
        (pa.array([1, 2, -7]), 3),
        (pa.array([True, False, True]), 2),
        (pa.array(["0", "1", "owl"]), 3),
        (pa.array([b"0", b"1", b"2"]), None),
        (pa.array([[0, 1], [1, 0], [0, 0]]), None),
        (pa.array([[0], [1, 0], []]), None),
        (pa.array([{"a": 1}, {"a": 2}, {"a": 3}]), None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_column_of_parquet_that_holds_no_classes(recipe, finetuned, known, column, row):
    pq.write_table(pa.table({"key": [known[c][0] for c in range(3)], "label": column}), "labels.parquet")
    message = refused("finetune", recipe(), "--labels", "labels.parquet")
    assert message.startswith("labels.parquet: ")
    assert row is None or message.startswith(f"labels.parquet: row {row}: label ")


@pytest.mark.parametrize(
    "column",
    [pa.array([0.0, math.nan, 2.0]), pa.array([0, None, 2]), pa.array([0, -1, 2], pa.int8())],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_whole_floats_and_three_ways_to_know_nothing(recipe, finetuned, known, column):
    pq.write_table(pa.table({"key": [known[c][0] for c in range(3)], "label": column}), "labels.parquet")
    table = DataSet.open(Path(recipe().read_text().partition("path: ")[2].splitlines()[0])).read_labels(Path("labels.parquet"))
    assert table.labels.tolist() == [0, -1, 2]


# --- the same key twice


@pytest.mark.parametrize("second", ["9", "", "-1"])
def test_two_rows_of_a_key_that_disagree_are_named(recipe, finetuned, labels, known, second):
    labels(ALL, f"{known[0][0]},{second}\n")
    message = one_line("finetune", recipe(), "--labels", "labels.csv")
    assert f"rows 1 and {10 * FEW + 1} disagree about the key {known[0][0]!r}. Keep one of them." in message


def test_two_rows_of_a_key_that_agree_are_one_label(recipe, finetuned, labels, known):
    labels(ALL, "".join(f"{key},{c}\n" for c, keys in known.items() for key in keys))
    answer = call("finetune", recipe({"finetune.epochs": 1, "finetune.baselines": False}), "--labels", "labels.csv")
    assert f": {10 * FEW} labels of 1,298 train rows" in answer.stderr


# --- classes that only another split has


@pytest.mark.slow
def test_a_class_that_train_never_shows(here, recipe):
    """Packed from tables of a train and a test split, of which the second knows one class more."""
    folder = here / "animals"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [f"{u:.3f},{v:.3f}" for u, v in rng.normal(size=(60, 2))]
    for name, animals in {"train": ["cat", "dog"], "test": ["cat", "dog", "owl"]}.items():
        cells = "".join(f"{row},{animals[i % len(animals)]}\n" for i, row in enumerate(rows))
        (folder / f"{name}.csv").write_text(f"u,v,label\n{cells}")
    assert call("data", "pack", folder, "packed").code == 0
    path = recipe(
        {"data": {"path": "packed"}, "model.latent_dim": 2, "model.encoder.widths": [5], "model.decoder.likelihood": "gaussian"}
    )
    assert call("pretrain", path).code == 0
    answer = call("finetune", path, "--labels", "all", "--json").json
    assert "no train row has a label of class 'owl': such samples will be taken for others." in answer["warnings"]
    assert call("evaluate", "runs/tiny", "--split", "test", "--json").json["metrics"]["accuracy"] <= 2 / 3
