"""extract: the Parquet contract of the latents."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from command_line import call, one_line, snapshot
from safetensors.numpy import load_file

from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import LabelTable

K = 5  # TINY's latent_dim
LIST = pa.list_(pa.float32(), K)


def table(run, split, place="latents"):
    return pyarrow.dataset.dataset(run / place / split).to_table()


def values(found):
    return np.stack(found["latent"].to_numpy())


@pytest.fixture
def latents(finetuned):
    """The latents of `finished`."""
    return finetuned / "latents"


def test_the_schema(latents):
    schema = pq.read_schema(latents / "test" / "part-00000.parquet")
    assert {field.name: field.type for field in schema} == {
        "key": pa.string(), "label": pa.int64(), "latent": LIST, "latent_std": LIST,
    }  # fmt: skip
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    stage = json.loads((latents.parent / "pretrain" / "stage.json").read_text())
    assert metadata["ssl_ae.schema_version"] == "1"
    assert metadata["recipe_fingerprint"] == stage["fingerprint"]
    assert metadata["checkpoint_sha256"] == snapshot(latents.parent / "pretrain")["model.safetensors"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_row_once_and_in_order(finetuned, digits, split):
    data, found = DataSet.open(digits), table(finetuned, split)
    assert found["key"].to_pylist() == data.split(split).keys.tolist()
    assert found["label"].to_pylist() == data.labels(split).tolist()
    assert np.isfinite(np.stack(found["latent"].to_numpy())).all()
    assert (np.stack(found["latent_std"].to_numpy()) > 0).all()


def test_labels_are_what_the_side_table_knows_whatever_the_budget(finetuned):
    labels = table(finetuned, "train")["label"]  # the recipe's budget is 3 a class
    assert labels.null_count == 0


def test_the_folder_holds_a_table_and_nothing_else_that_a_reader_would_take(latents):
    for split in ("train", "val", "test"):
        assert {path.name for path in (latents / split).iterdir()} == {"part-00000.parquet", "_manifest.json"}
    manifest = json.loads((latents / "test" / "_manifest.json").read_text())
    assert (manifest["rows"], manifest["parts"]) == (355, ["part-00000.parquet"])


def test_a_point_has_no_deviation(recipe, here):
    path = recipe({"model.encoder.posterior": "point", "model.regularizers": []})
    assert call("pretrain", path).code == 0
    assert call("extract", "runs/tiny", "--split", "val").code == 0
    assert pq.read_schema(here / "runs/tiny/latents/val/part-00000.parquet").names == ["key", "label", "latent"]


def test_scores_add_the_reconstruction_in_nats(finetuned, recipe):
    answer = call("extract", finetuned, "--split", "val", "--scores", "--json").json
    nats = table(finetuned, "val")["reconstruction_nats"]
    assert nats.type == pa.float32()
    assert answer["metrics"]["val/reconstruction_nats"] == pytest.approx(np.mean(nats.to_numpy()), rel=1e-5)
    # 64 binary pixels that are known to nobody cost 64 ln 2 = 44.4 nats
    assert 10 < np.mean(nats.to_numpy()) < 64 * np.log(2) + 5


def test_a_table_with_scores_serves_where_none_are_asked(finetuned):
    assert call("extract", finetuned, "--split", "val", "--scores").code == 0
    before = snapshot(finetuned)
    assert call("extract", finetuned, "--split", "val", "--json").json["status"] == "skipped"
    assert snapshot(finetuned) == before


def test_a_second_time_it_skips(finetuned):
    before = snapshot(finetuned)
    answer = call("extract", finetuned, "--json").json
    assert answer["status"] == "skipped"
    assert set(answer["outputs"]) == {"train", "val", "test"}
    assert snapshot(finetuned) == before


def test_other_weights_make_other_latents(finetuned, recipe):
    before = table(finetuned, "val")
    assert call("pretrain", recipe({"seed": 1}), "--restart").code == 0
    assert call("extract", finetuned, "--split", "val", "--json").json["status"] == "done"
    assert not table(finetuned, "val").equals(before)


def test_an_interrupted_table_is_made_again(finetuned):
    whole = {split: snapshot(finetuned / "latents" / split) for split in ("train", "val", "test")}
    (finetuned / "latents" / "val" / "_manifest.json").unlink()
    assert call("extract", finetuned, "--json").json["status"] == "done"
    assert {split: snapshot(finetuned / "latents" / split) for split in whole} == whole


def test_new_labels_in_the_side_table_reach_the_latents(recipe, here, digits):
    data = shutil.copytree(digits, here / "digits")
    path = recipe({"data.path": str(data)})
    assert call("pretrain", path, "--epochs", 1).code == 0
    assert call("extract", "runs/tiny", "--split", "val").code == 0
    known = LabelTable.read(data / "labels.parquet", DataSet.open(data).card.y)
    LabelTable(known.keys[:900], known.labels[:900]).write(data / "labels.parquet")
    assert call("extract", "runs/tiny", "--split", "val").code == 0
    expected = [None if label < 0 else label for label in DataSet.open(data).labels("val").tolist()]
    assert None in expected
    assert table(here / "runs/tiny", "val")["label"].to_pylist() == expected


def test_one_split_alone(pretrained):
    answer = call("extract", pretrained, "--split", "test", "--json").json
    assert set(answer["outputs"]) == {"test"}
    assert answer["metrics"] == {"test/rows": 355.0}
    assert [split for split in ("train", "val", "test") if (pretrained / "latents" / split).exists()] == ["test"]


def test_another_data_set_lies_in_a_folder_of_its_name(finetuned, digits, here):
    other = shutil.copytree(digits, here / "other")
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"name": "later"}))
    answer = call("extract", finetuned, "--data", other, "--split", "val", "--json").json
    assert answer["outputs"] == {"val": str(finetuned / "latents" / "later" / "val")}
    ours = pyarrow.dataset.dataset(finetuned / "latents" / "later" / "val").to_table()
    assert ours.equals(table(finetuned, "val"))


@pytest.mark.parametrize("name", ["train", "val", "journal"])
def test_another_data_set_may_not_lie_inside_a_split(finetuned, digits, here, name):
    """latents/train/val would be read as a part of latents/train."""
    other = shutil.copytree(digits, here / "other")
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"name": name}))
    message = one_line("extract", finetuned, "--data", other, "--split", "val")
    assert message == (
        f"{other} is called {name!r}, and latents/{name} is a place of the run's own. "
        f"Give it another `name` in {other / 'card.json'}."
    )


# --- layers


def test_any_layer_is_what_the_weights_make_of_the_samples(finetuned, digits):
    """h1 = relu(W x + b) and d1 = relu(V E[z|x] + c), by hand; x in [0, 1], E[z|x] as it is stored."""
    for layer in ("input", "h1", "code", "d1"):
        assert call("extract", finetuned, "--split", "val", "--layer", layer).code == 0
    found = {layer: values(table(finetuned, "val", f"layers/{layer}")) for layer in ("input", "h1", "code", "d1")}
    weights = load_file(finetuned / "pretrain" / "model.safetensors")
    x = DataSet.open(digits).split("val").read(np.arange(144)).reshape(144, 64) / 16
    z = values(table(finetuned, "val"))

    def relu(h, name):
        return np.maximum(h @ weights[f"{name}.layers.blocks.0.0.weight"].T + weights[f"{name}.layers.blocks.0.0.bias"], 0)

    np.testing.assert_allclose(found["input"], x, rtol=1e-6)
    np.testing.assert_allclose(found["h1"], relu(x, "encoder"), atol=1e-5)
    np.testing.assert_array_equal(found["code"], z)  # the mean, no draw, though the posterior is random
    np.testing.assert_allclose(found["d1"], relu(z, "decoder"), atol=1e-5)


def test_a_layer_is_stored_as_latents_are(finetuned, digits):
    before = snapshot(finetuned / "latents")
    answer = call("extract", finetuned, "--layer", "h1", "--json").json
    assert answer["outputs"] == {split: str(finetuned / "layers" / "h1" / split) for split in ("train", "val", "test")}
    assert answer["metrics"] == {"train/rows": 1298.0, "val/rows": 144.0, "test/rows": 355.0}
    assert snapshot(finetuned / "latents") == before
    folder = finetuned / "layers" / "h1"
    assert {path.name for path in folder.iterdir()} == {"train", "val", "test", "journal", "_map.png"}
    assert {path.name for path in (folder / "test").iterdir()} == {"part-00000.parquet", "_manifest.json"}
    schema = pq.read_schema(folder / "test" / "part-00000.parquet")
    types = {field.name: field.type for field in schema}
    assert types == {"key": pa.string(), "label": pa.int64(), "latent": pa.list_(pa.float32(), 17)}
    assert schema.metadata[b"layer"] == b"h1"
    assert table(finetuned, "train", "layers/h1")["key"].to_pylist() == DataSet.open(digits).split("train").keys.tolist()


def test_a_layer_is_extracted_once_and_again_where_it_must_be(finetuned, recipe):
    first = call("extract", finetuned, "--layer", "h1", "--split", "val", "--json").json
    assert first["status"] == "done"
    whole = snapshot(finetuned)
    assert call("extract", finetuned, "--layer", "h1", "--split", "val", "--json").json["status"] == "skipped"
    assert snapshot(finetuned) == whole
    (finetuned / "layers" / "h1" / "val" / "_manifest.json").unlink()
    assert call("extract", finetuned, "--layer", "h1", "--split", "val", "--json").json["status"] == "done"
    assert snapshot(finetuned / "layers" / "h1" / "val") == {
        name.removeprefix("layers/h1/val/"): digest for name, digest in whole.items() if name.startswith("layers/h1/val/")
    }
    old = table(finetuned, "val", "layers/h1")
    assert call("pretrain", recipe({"seed": 1}), "--restart").code == 0
    assert call("extract", finetuned, "--layer", "h1", "--split", "val", "--json").json["status"] == "done"
    assert not table(finetuned, "val", "layers/h1").equals(old)


def test_a_layer_of_maps_lies_flat(recipe, here):
    """Two 3 x 3 stride-2 convolutions on 8 x 8: 3 maps of 4 x 4."""
    conv = {"name": "conv", "channels": [3, 2]}
    model = {"model.encoder": conv, "model.decoder": {"name": "conv", "likelihood": "bernoulli"}, "model.regularizers": []}
    assert call("pretrain", recipe(model), "--epochs", 1).code == 0
    assert call("extract", "runs/tiny", "--layer", "h1", "--split", "val").code == 0
    found = values(table(here / "runs/tiny", "val", "layers/h1"))
    assert found.shape == (144, 3 * 4 * 4)
    assert found.any()


def test_a_layer_of_another_data_set(finetuned, digits, here):
    other = shutil.copytree(digits, here / "other")
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"name": "later"}))
    answer = call("extract", finetuned, "--data", other, "--split", "val", "--layer", "h1", "--json").json
    assert answer["outputs"] == {"val": str(finetuned / "layers" / "h1" / "later" / "val")}


def test_a_layer_that_is_not_there(finetuned):
    message = one_line("extract", finetuned, "--layer", "cod")
    layers = "input, h1, code and d1"
    assert message == f"--layer cod: the model of {finetuned} has no such layer; it has {layers}. Did you mean code?"


def test_scores_are_of_the_code(finetuned):
    message = one_line("extract", finetuned, "--layer", "h1", "--scores")
    assert message.startswith("--scores and --layer h1: scores are of the code.")
