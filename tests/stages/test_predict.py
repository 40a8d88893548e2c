"""predict: the table of predictions, and what may be predicted on."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from PIL import Image

from ssl_ae.data.dataset import DataSet
from ssl_ae.stages.predict import Predictor


def predictions(run, data, *words):
    assert call("predict", run, data, "--out", "p.parquet", *words).code == 0
    return pq.read_table("p.parquet")


def test_the_schema(finetuned, digits):
    table = predictions(finetuned, digits)
    classes = [f"p_{digit}" for digit in range(10)]
    assert table.column_names == ["key", "label", "probability", *classes, "reconstruction_nats"]
    assert table.schema.field("key").type == table.schema.field("label").type == pa.string()
    assert {table.schema.field(name).type for name in ("probability", *classes, "reconstruction_nats")} == {pa.float32()}
    p = np.stack([table[name].to_numpy() for name in classes], axis=1)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(table["probability"].to_numpy(), p.max(1))
    assert table["label"].to_pylist() == [str(best) for best in p.argmax(1)]


def test_every_sample_of_every_split_once(finetuned, digits):
    data = DataSet.open(digits)
    keys = [key for split in ("train", "val", "test") for key in data.split(split).keys]
    assert predictions(finetuned, digits)["key"].to_pylist() == keys


def test_a_method_may_be_named(finetuned, digits):
    last = predictions(finetuned, digits)
    assert last.equals(predictions(finetuned, digits, "--method", "joint-alpha0.01"))
    assert not last.equals(predictions(finetuned, digits, "--method", "sequential"))


def test_each_row_is_predicted_by_itself(finetuned, digits):
    x = DataSet.open(digits).split("test").read(np.arange(7))
    predictor = Predictor.load(finetuned / "finetune" / "sequential", "cpu")
    together, alone = predictor.predict(x), [predictor.predict(x[i : i + 1]) for i in range(7)]
    for name, column in together.items():
        if column.dtype == object:
            assert column.tolist() == [row[name][0] for row in alone]
        else:
            np.testing.assert_allclose(column, [row[name][0] for row in alone], rtol=1e-5)


def test_no_rows_are_no_mistake(finetuned):
    found = Predictor.load(finetuned / "finetune" / "sequential", "cpu").predict(np.empty((0, 1, 8, 8), np.uint8))
    assert all(len(column) == 0 for column in found.values())
    assert "probability" in found


@pytest.fixture
def x(digits):
    """The first 41 test digits, with pixels up to 255 as PNG has them: 15 times the stored ones."""
    return DataSet.open(digits).split("test").read(np.arange(41))


def png(sample) -> bytes:
    file = io.BytesIO()
    Image.fromarray(sample[0]).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["images", "npz", "webdataset"])
def test_sources_that_are_not_packed(finetuned, here, x, kind):
    """The same samples by any door get the same predictions."""
    (here / "new").mkdir()
    if kind == "images":
        for i, sample in enumerate(x):
            (here / "new" / f"{i:02d}.png").write_bytes(png(sample))
    elif kind == "npz":
        np.savez(here / "new.npz", x=x)
    else:
        with tarfile.open(here / "new" / "part.tar", "w") as tar:
            for i, sample in enumerate(x):
                content = png(sample)
                info = tarfile.TarInfo(f"{i:02d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = predictions(finetuned, "new.npz" if kind == "npz" else "new").to_pydict()
    order = np.argsort(table["key"])
    expected = Predictor.load(finetuned / "finetune" / "joint-alpha0.01", "cpu").predict(x)
    np.testing.assert_allclose(np.array(table["probability"])[order], expected["probability"], rtol=1e-5)
    assert not [path for path in here.iterdir() if path.name not in ("new", "new.npz", "p.parquet", "runs")]


def test_photos_of_any_size_are_resized_as_the_training_images_were(finetuned, here, x):
    (here / "photos").mkdir()
    for i, sample in enumerate(x):
        size = (8, 8) if i % 2 else (24, 16)
        Image.fromarray(sample[0]).resize(size, Image.Resampling.NEAREST).save(here / "photos" / f"{i:02d}.png")
    assert predictions(finetuned, "photos").num_rows == 41


def test_pixels_in_other_units_are_warned_of(finetuned, here, x):
    np.savez(here / "new.npz", x=x)  # bytes go from 0 to 255, the digits that were packed from 0 to 16
    (warning,) = call("predict", finetuned, "new.npz", "--out", "p.parquet", "--json").json["warnings"]
    assert warning.startswith("the values of new.npz may go from 0 to 255, those that the model learned from went from 0 to 16")


@pytest.fixture
def table_run(recipe, here):
    """A run on a table with the columns a, b and c."""
    rng = np.random.default_rng(0)
    write_table(here / "train.csv", ["a", "b", "c", "label"], [[*row, int(row[0] > 0)] for row in rng.normal(size=(101, 3))])
    assert call("data", "pack", "train.csv", "table").code == 0
    path = recipe({"data.path": "table", "data.labels": "all", "model.decoder.likelihood": "gaussian"})
    for command in ("pretrain", "finetune"):
        assert call(command, path).code == 0
    return here / "runs" / "tiny"


def write_table(path, names, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in (names, *rows)) + "\n")


def test_columns_are_found_by_name(table_run, here):
    rows = np.random.default_rng(1).normal(size=(11, 3))
    write_table(here / "new.csv", ["a", "b", "c"], rows)
    write_table(here / "turned.csv", ["extra", "c", "a", "b"], [[7, row[2], row[0], row[1]] for row in rows])
    assert predictions(table_run, "new.csv").equals(predictions(table_run, "turned.csv"))


@pytest.mark.parametrize("name", ["key", "reconstruction_nats"])
def test_a_target_cannot_be_called_as_a_column_of_predictions(here, name):
    write_table(here / "t.csv", ["a", "b", name], np.random.default_rng(0).normal(size=(29, 3)))
    answer = call("data", "pack", "t.csv", "packed", "--label", name, "--task", "regression")
    assert answer.code == 2
    assert f"label column '{name}': a table of predictions has a column of that name beside the targets' own" in answer.stderr
    assert not (here / "packed").exists()


def test_a_folder_has_the_name_of_the_table(finetuned, digits, here):
    (here / "p.parquet").mkdir()
    answer = call("predict", finetuned, digits, "--out", "p.parquet")
    assert answer.code == 2
    assert "--out p.parquet is a folder" in answer.stderr
    assert list(here.glob(".p.parquet*")) == []


def test_columns_that_are_missing_are_named(table_run, here):
    write_table(here / "new.csv", ["a", "c", "d"], np.zeros((11, 3)))
    answer = call("predict", table_run, "new.csv", "--out", "p.parquet")
    assert answer.code == 2
    assert "new.csv lacks 1 of the model's 3 columns: b. It has a, c and d." in answer.stderr


def test_extract_refuses_columns_in_another_order(table_run, here):
    write_table(here / "turned.csv", ["b", "a", "c"], np.ones((11, 3)) * np.arange(11)[:, None])
    assert call("data", "pack", "turned.csv", "turned").code == 0
    answer = call("extract", table_run, "--data", "turned")
    assert answer.code == 2
    assert "b, a and c instead of a, b and c" in answer.stderr


def test_the_table_that_was_packed_can_be_predicted(here):
    """Its key is a text column and its label stands in it: both are named, as for `data pack`."""
    rows = "".join(f"tree{i},{i % 7},{i % 11},{'oak' if i % 2 else 'elm'}\n" for i in range(97))
    (here / "trees.csv").write_text("id,a,b,species\n" + rows)
    (here / "trees.yaml").write_text(
        "name: trees\ndata: {path: trees, labels: all}\nmodel: {latent_dim: 2, encoder: {name: linear}, "
        "decoder: {name: linear, likelihood: gaussian}, head: {name: softmax}}\n"
        "pretrain: {epochs: 1}\nfinetune: {epochs: 1, baselines: false}\n"
    )
    columns = ("--label", "species", "--key", "id")
    assert call("data", "pack", "trees.csv", "trees", *columns).code == 0
    assert call("pretrain", "trees.yaml").code == 0
    assert call("finetune", "trees.yaml").code == 0
    assert call("predict", "runs/trees", "trees.csv", "--out", "p.parquet", *columns).code == 0
    assert set(pq.read_table(here / "p.parquet")["key"].to_pylist()) == {f"tree{i}" for i in range(97)}
