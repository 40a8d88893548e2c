"""suggest: a sheet of samples to label, read back by `--labels` once it is filled in."""

import csv
import json

import numpy as np
import pytest
from command_line import call
from PIL import Image

from ssl_ae import latents
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import LabelTable


def sheet_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def filled(path, digits, skip=()):
    """The sheet with the true labels, as somebody types them in."""
    train = DataSet.open(digits)
    known = dict(zip(train.split("train").keys, train.labels("train"), strict=True))
    rows = sheet_of(path)
    lines = [f"{row['key']},{'' if place in skip else known[row['key']]},{row['thumbnail']}" for place, row in enumerate(rows)]
    target = path.with_name("filled.csv")
    target.write_text("\n".join(["key,label,thumbnail", *lines]) + "\n")
    return target


def test_the_sheet_comes_back_as_labels(pretrained, recipe, digits, here):
    said = call("suggest", pretrained, "--budget", 20, "--out", "sheet.csv", "--json")
    answer = said.json
    assert answer["rule"].startswith("typical codes")
    assert "half of a budget on each" in said.stderr
    assert answer["metrics"] == {"rows": 20.0, "labeled": 0.0}
    rows, train = sheet_of("sheet.csv"), DataSet.open(digits).split("train")
    assert len({row["key"] for row in rows}) == 20
    for row in rows:
        (at,) = np.flatnonzero(train.keys == row["key"])
        stored = train.read(np.array([at]))[0, 0]
        np.testing.assert_allclose(np.asarray(Image.open(here / row["thumbnail"])), stored * (255 / 16), atol=0.51)
    labels = filled(here / "sheet.csv", digits, skip={3})
    said = call("finetune", recipe(), "--out", pretrained, "--labels", labels, "--epochs", 1)
    assert said.code == 0, said.stderr
    assert "19 labels of" in said.stderr


def test_after_finetuning_it_follows_the_doubts(finetuned, digits, here):
    said = call("suggest", finetuned, "--budget", 7, "--out", "sheet.csv", "--json")
    answer = said.json
    assert answer["rule"].startswith("smallest margins of ")
    assert "half of a budget" not in said.stderr
    assert answer["metrics"]["rows"] == 7
    assert 0 <= answer["metrics"]["margin"] < 1
    again = call("suggest", finetuned, "--budget", 7, "--out", "again.csv", "--json").json
    assert [row["key"] for row in sheet_of("sheet.csv")] == [row["key"] for row in sheet_of("again.csv")]
    assert again["metrics"] == answer["metrics"]


def test_a_label_that_is_there_is_not_asked_for_again(pretrained, recipe, digits, here):
    call("suggest", pretrained, "--budget", 20, "--out", "sheet.csv")
    labels = filled(here / "sheet.csv", digits)
    assert call("finetune", recipe(), "--out", pretrained, "--labels", labels, "--epochs", 1).code == 0
    more = call("suggest", pretrained, "--budget", 20, "--out", "more.csv", "--json").json
    assert more["metrics"]["labeled"] == 20
    rows = sheet_of("more.csv")
    assert not {row["key"] for row in sheet_of("sheet.csv")} & {row["key"] for row in rows[:20]}
    given = {row["key"]: row["label"] for row in sheet_of(labels)}
    assert {row["key"]: row["label"] for row in rows[20:]} == given  # the sheet alone is what `--labels` takes
    said = call("run", recipe({"stages": ["pretrain", "extract", "finetune"]}), "--out", pretrained, "--labels", "more.csv")
    assert said.code == 0, said.stderr
    assert "20 labels of" in said.stderr


def test_weights_and_numbers_come_along(here):
    """Regression: numbers with as many digits as it takes to read the same ones back."""
    random = np.random.default_rng(0)
    np.savez("numbers.npz", x_train=random.normal(size=(53, 7)).astype(np.float32), y_train=random.normal(size=(53, 2)))
    assert call("data", "pack", "numbers.npz", "data").code == 0
    data = DataSet.open(here / "data")
    keys = data.split("train").keys[:11]
    wanted = {key: (random.normal(size=2).astype(np.float32), random.random(dtype=np.float32)) for key in keys}
    lines = [f"{key},{a} {b},{weight}" for key, ((a, b), weight) in wanted.items()]
    (here / "labels.csv").write_text("\n".join(["key,label,weight", *lines]) + "\n")
    recipe = {
        "name": "numbers",
        "data": {"path": "data", "labels": "labels.csv"},
        "model": {"latent_dim": 3, "encoder": {"name": "mlp"}, "decoder": {"name": "mlp"}, "head": {"name": "gaussian"}},
        "pretrain": {"epochs": 1},
    }
    (here / "recipe.yaml").write_text(json.dumps(recipe))
    assert call("run", "recipe.yaml", "--set", "stages=[pretrain, extract]", "--out", "run").code == 0
    said = call("suggest", "run", "--budget", 5, "--out", "sheet.csv")
    assert said.code == 0
    assert "half of a budget" not in said.stderr  # numbers have no margin: the next sheet would be of the codes again
    table = LabelTable.read(here / "sheet.csv", data.card.y)
    assert len(table.keys) == 16
    for key, label, weight in list(zip(table.keys, table.labels, table.weight, strict=True))[5:]:
        np.testing.assert_array_equal(label, wanted[key][0])
        assert weight == wanted[key][1]


def test_a_sheet_of_every_row_speaks_of_no_other(pretrained):
    said = call("suggest", pretrained, "--budget", 9_999, "--out", "sheet.csv")
    assert "only 1,298 rows of train have no label yet" in said.stderr
    assert "half of a budget" not in said.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", 3, "--out", "sheet.txt"], "--out sheet.txt: the sheet is a CSV file"),
        (["--budget", 3, "--out", "there.csv"], "there.csv exists, and what was made of it would be lost"),
        (["--budget", 3, "--out", "pictures.csv"], "pictures-thumbnails exists"),
        (["--budget", 0, "--out", "sheet.csv"], "greater than or equal to 1"),
        (["--budget", 3, "--out", "sheet.csv", "--method", "joint"], "holds no finetuned model"),
    ],
)
def test_what_is_refused(pretrained, here, words, message):
    (here / "there.csv").write_text("key,label\na,1\n")
    (here / "pictures-thumbnails").mkdir()
    answer = call("suggest", pretrained, *words)
    assert answer.code == 2
    assert message in " ".join(answer.stderr.split())
    assert (here / "there.csv").read_text() == "key,label\na,1\n"
    assert not (here / "sheet.csv").exists()


def test_typical_rows_are_of_the_codes(pretrained, here):
    """One row asked for is the medoid: the code nearest to the mean of all."""
    call("suggest", pretrained, "--budget", 1, "--out", "one.csv")
    table = latents.read(pretrained / "latents" / "train")
    nearest = np.linalg.norm(table.z - table.z.mean(0), axis=1).argmin()
    assert [row["key"] for row in sheet_of("one.csv")] == [table.keys[nearest]]
