"""reconstruct: a data set of what the model makes of samples, how close it comes, and nothing written where it cannot."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call, one_line, snapshot, with_fields, write_yaml
from conftest import TINY
from PIL import Image

from ssl_ae.data.card import X
from ssl_ae.data.dataset import DataSet
from ssl_ae.stages.reconstruct import _file_of, _sizes, psnr

POINT = {"name": "mlp", "widths": [67]}
GAUSSIAN = {"name": "mlp", "likelihood": "gaussian"}


def run_of(folder, data, patch, regularizers, **fields):
    """A pretrained autoencoder in `folder`, deterministic unless told otherwise."""
    model = {"model.encoder": POINT, "model.decoder": GAUSSIAN, "model.regularizers": regularizers, "model.latent_dim": 23}
    patch.setenv("SSL_AE_TRACKING", "journal")
    patch.chdir(folder)
    path = write_yaml(
        folder / "recipe.yaml", with_fields(TINY, {"data.path": str(data), "data.labels": "all", **model, **fields})
    )
    assert call("pretrain", path).code == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Cleans Gaussian noise of 0.3 from digits, a little."""
    with pytest.MonkeyPatch.context() as patch:
        noise, more = {"name": "gaussian_noise", "scale": 0.3}, {"pretrain.epochs": 20, "pretrain.optimizer": {"lr": 0.003}}
        return run_of(tmp_path_factory.mktemp("denoising"), digits, patch, [noise], **more)


@pytest.fixture
def denoising(trained, here):
    return shutil.copytree(trained, here / "denoising")


@pytest.fixture(scope="module")
def trained_in_grey(tmp_path_factory):
    """83 colour images of 7 x 5 as colours.npz and packed, and a model that saw them in grey."""
    folder, x = tmp_path_factory.mktemp("grey"), np.random.default_rng(0).integers(0, 256, (83, 3, 7, 5), dtype=np.uint8)
    np.savez(folder / "colours.npz", x=x)
    with pytest.MonkeyPatch.context() as patch:
        assert call("data", "pack", folder / "colours.npz", folder / "colours").code == 0
        run_of(folder, folder / "colours", patch, [{"name": "grayscale"}])
    return folder


@pytest.fixture
def colours(trained_in_grey, here):
    return shutil.copytree(trained_in_grey, here, dirs_exist_ok=True) / "runs" / "tiny"


@pytest.fixture(scope="module")
def trained_on_a_table(tmp_path_factory):
    """A model of 61 standardised rows a, b, c of very different spread."""
    folder, random = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    write_table(folder / "table.csv", ["a", "b", "c"], random.normal(size=(61, 3)) * [1, 10, 100] + [0, 5, -300])
    with pytest.MonkeyPatch.context() as patch:
        assert call("data", "pack", folder / "table.csv", folder / "table").code == 0
        run_of(folder, folder / "table", patch, [{"name": "masking_noise"}])
    return folder


@pytest.fixture
def table(trained_on_a_table, here):
    return shutil.copytree(trained_on_a_table, here, dirs_exist_ok=True) / "runs" / "tiny"


def write_table(path, names, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in (names, *rows)) + "\n")


def samples(data, split="val"):
    part = DataSet.open(data).split(split)
    return part.read(np.arange(part.rows))


def decibels(found, clean, peak):
    return 10 * math.log10(peak**2 / np.mean((found.astype(float) - clean) ** 2))


# --- what is written


def test_a_data_set_with_the_same_keys_labels_and_kind(denoising, digits, here):
    answer = call("reconstruct", denoising, digits, "--out", "clean", "--json").json
    before, after = DataSet.open(digits), DataSet.open("clean", verify=True)
    assert after.card.x == before.card.x
    assert after.card.y == before.card.y
    assert list(after.card.splits) == ["train", "val", "test"]
    for name in after.card.splits:
        assert after.split(name).keys.tolist() == before.split(name).keys.tolist()
        np.testing.assert_array_equal(after.labels(name), before.labels(name))
        x = samples("clean", name)
        assert x.max() <= 16  # of digits that go from 0 to 16
        assert np.abs(x.astype(float) - samples(digits, name)).mean() < 2  # and not those of another row
    assert sorted(path.name for path in (here / "clean").iterdir()) == [
        "card.json", "labels.parquet", "reconstructions.png", "scores.parquet",
        "test-000000.tar", "train-000000.tar", "val-000000.tar",
    ]  # fmt: skip
    assert call("data", "inspect", "clean").code == 0
    names = {"data": "", "card": "/card.json", "scores": "/scores.parquet", "picture": "/reconstructions.png"}
    assert answer["outputs"] == {name: f"clean{end}" for name, end in names.items()}
    assert answer["metrics"]["rows"] == 1797


def test_the_result_can_be_trained_on(denoising, digits, recipe):
    assert call("reconstruct", denoising, digits, "--out", "clean").code == 0
    assert call("pretrain", recipe({"data.path": "clean"}), "--epochs", 1).code == 0


def test_the_scores(denoising, digits):
    metrics = call("reconstruct", denoising, digits, "--split", "val", "--out", "clean", "--json").json["metrics"]
    table = pq.read_table("clean/scores.parquet")
    assert table.column_names == ["key", "mse", "reconstruction_nats"]
    assert table.schema.field("key").type == pa.string()
    assert {table.schema.field(name).type for name in table.column_names[1:]} == {pa.float32()}
    assert table["key"].to_pylist() == DataSet.open(digits).split("val").keys.tolist()
    mse = table["mse"].to_numpy().astype(float)
    written = np.square(samples("clean").astype(float) - samples(digits)).mean((1, 2, 3))
    # the file's numbers are rounded by r, of variance 1/12: 1/64 sum (2 e r + r^2), within 5 sd
    assert (np.abs(written - mse - 1 / 12) < 5 * 2 * np.sqrt(mse / 12 / 64)).all()
    assert metrics["mse"] == pytest.approx(mse.mean(), rel=1e-6)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(16**2 / mse.mean()), abs=1e-6)
    assert metrics["reconstruction_nats"] == pytest.approx(table["reconstruction_nats"].to_numpy().mean(), rel=1e-5)
    assert (metrics["bytes_per_sample"], metrics["input_bytes_per_sample"]) == (23 * 4, 8 * 8)
    assert DataSet.open("clean").card.splits.keys() == {"val"}


def test_the_scores_are_those_of_predict(finetuned, digits):
    """A sequential finetuning leaves encoder and decoder as they were."""
    assert call("predict", finetuned, digits, "--method", "sequential", "--out", "p.parquet").code == 0
    assert call("reconstruct", finetuned, digits, "--out", "clean").code == 0
    ours, theirs = (pq.read_table(path)["reconstruction_nats"].to_numpy() for path in ("clean/scores.parquet", "p.parquet"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_without_a_head_will_do(pretrained, digits):
    assert call("reconstruct", pretrained, digits, "--split", "val", "--out", "clean").code == 0


def test_pictures_of_every_sample(denoising, digits, here):
    words = ("--split", "val", "--out", "clean", "--images", "--json")
    assert call("reconstruct", denoising, digits, *words).json["outputs"]["images"] == "clean/images"
    keys, x = DataSet.open("clean").split("val").keys, samples("clean")
    assert sorted(path.stem for path in (here / "clean" / "images").iterdir()) == sorted(keys)
    for key, sample in zip(keys, x, strict=True):
        pixels = np.asarray(Image.open(here / "clean" / "images" / f"{key}.png"))
        assert pixels.shape == (8, 8)
        np.testing.assert_allclose(pixels / 255 * 16, sample[0], atol=0.55)  # the range 0 to 16 becomes 0 to 255


def test_pictures_in_colour(colours, here):
    assert call("reconstruct", colours, "colours.npz", "--out", "clean", "--images").code == 0
    data = DataSet.open("clean")
    key, sample = data.split("train").keys[5], samples("clean", "train")[5]
    np.testing.assert_array_equal(np.asarray(Image.open(here / "clean" / "images" / f"{key}.png")), sample.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train/cat/17", "train/cat/17.png"),
        ("a.b", "a.b.png"),
        ("../../x", "%2E%2E/%2E%2E/x.png"),
        ("/etc/x", "%/etc/x.png"),
        ("..", "%2E%2E.png"),
        ("", "%.png"),
        ("Größe 7", "Größe 7.png"),
    ],
)
def test_no_key_leads_out_of_the_folder(key, name):
    assert _file_of(key) == name


# --- clean, noisy, cleaned


def test_noise_is_undone_and_measured_on_the_scale_of_the_data(denoising, digits):
    """Noise of 0.3 on numbers scaled to [0, 1]: PSNR -20 log10(0.3) dB; of n numbers the mse has relative sd sqrt(2 / n)."""
    answer = call("reconstruct", denoising, digits, "--split", "val", "--corrupt", "--out", "clean", "--json").json
    metrics, size = answer["metrics"], 144 * 64
    assert metrics["psnr_noisy"] == pytest.approx(-20 * math.log10(0.3), abs=5 * (2 / size) ** 0.5 * 10 / math.log(10))
    assert metrics["psnr_cleaned"] == metrics["psnr"] > metrics["psnr_noisy"] + 3
    assert decibels(samples("clean"), samples(digits), 16) == pytest.approx(metrics["psnr_cleaned"], abs=0.15)  # rounded
    table = pq.read_table("clean/scores.parquet")
    assert table.column_names == ["key", "mse", "mse_noisy", "reconstruction_nats"]
    assert metrics["psnr_noisy"] == pytest.approx(psnr(table["mse_noisy"].to_numpy().mean(dtype=float), 16), abs=1e-4)


def test_the_noise_is_the_same_every_time(denoising, digits, here):
    for name, words in {"all": ["--corrupt"], "a": ["--corrupt", "--split", "val"], "plain": ["--split", "val"]}.items():
        assert call("reconstruct", denoising, digits, "--out", name, *words).code == 0
    assert call("reconstruct", denoising, digits, "--corrupt", "--split", "val", "--out", "b").code == 0
    assert snapshot(here / "a") == snapshot(here / "b")
    shards = [(here / name / "val-000000.tar").read_bytes() for name in ("all", "a", "plain")]
    assert shards[0] == shards[1] != shards[2]


def test_a_model_of_grey_images_colours_grey_and_coloured_ones_alike(colours, here):
    """`always`: what it is asked to colour is made grey first, so disturbing the samples beforehand changes nothing."""
    plain = call("reconstruct", colours, "colours", "--out", "plain", "--json").json["metrics"]
    corrupt = call("reconstruct", colours, "colours", "--corrupt", "--out", "corrupt", "--json").json["metrics"]
    assert plain["psnr"] == pytest.approx(corrupt["psnr_cleaned"], rel=1e-5)
    x = np.concatenate([samples("colours", name) for name in ("train", "val")]).astype(float)
    grey = np.tensordot([0.299, 0.587, 0.114], x, axes=(0, 1))[:, None]
    assert corrupt["psnr_noisy"] == pytest.approx(decibels(np.broadcast_to(grey, x.shape), x, 255), abs=1e-3)


def test_bounds_of_the_likelihood(finetuned, digits):
    """In nats a row; by Jensen the mean of the ELBO lies below that of the importance-weighted bound."""
    answer = call("reconstruct", finetuned, digits, "--split", "val", "--draws", 20, "--out", "clean", "--json").json
    table = pq.read_table("clean/scores.parquet")
    assert table.column_names == ["key", "mse", "reconstruction_nats", "elbo", "iwae"]
    elbo, iwae = (table[name].to_numpy() for name in ("elbo", "iwae"))
    assert (elbo < 0).all()
    assert elbo.mean() < iwae.mean()
    assert answer["metrics"]["elbo"] == pytest.approx(elbo.mean(), rel=1e-5)
    assert answer["metrics"]["iwae"] == pytest.approx(iwae.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("symbol", "exact", "expected"),
    [(None, True, 4 * 30), (1, True, 4), (1, False, 4 * 30), (2, True, 2), (5, True, 3), (5, False, 4 * 30)],
)
def test_a_code_of_symbols_takes_their_bits(symbol, exact, expected):
    """K = 30: floats of 4 bytes, 30 bits, 15 symbols of 1 bit, or 6 of 3 bits; probabilities of symbols are floats."""
    encoder = SimpleNamespace(cls=SimpleNamespace(symbol=lambda config: symbol), config=None)
    made = SimpleNamespace(resolved=SimpleNamespace(encoder=encoder, shapes=SimpleNamespace(latent=30)))
    x = X(kind="vector", dtype="float32", shape=(7,), range=(0, 1))
    assert _sizes(made, x, exact) == {"bytes_per_sample": expected, "input_bytes_per_sample": 28}


@pytest.mark.parametrize(("sampling", "expected"), [("noise", 3), ("gumbel", 23 * 4)])
def test_bits_count_where_bits_are_decoded(here, digits, monkeypatch, sampling, expected):
    """23 bits take 3 bytes; with `gumbel` their probabilities are decoded, which are floats."""
    encoder = {"name": "hash", "widths": [], "sampling": sampling}
    fields = {"model.encoder": encoder, "pretrain.epochs": 1}
    run = run_of(here, digits, monkeypatch, [], **fields)
    words = ["--split", "val", "--out", "clean", "--json", *(["--draws", 3] if sampling == "gumbel" else [])]
    metrics = call("reconstruct", run, digits, *words).json["metrics"]
    assert metrics["bytes_per_sample"] == expected
    assert ("iwae" in metrics) == (sampling == "gumbel")  # bits that are drawn have a bound, too


# --- other samples


def test_standardised_columns_come_back_in_their_own_units(table, here):
    metrics = call("reconstruct", table, "table.csv", "--out", "clean", "--json").json["metrics"]
    before, after = (np.concatenate([samples(name, split) for split in ("train", "val")]) for name in ("table", "clean"))
    assert metrics["mse"] == pytest.approx(np.square(after.astype(float) - before).mean(), rel=1e-5)
    card = DataSet.open("clean").card
    assert card.x.features == ("a", "b", "c")
    low, high = card.x.range
    assert (low, high) == DataSet.open("table").card.x.range
    assert low <= after.min() < after.max() <= high
    np.testing.assert_allclose(card.x.mean, samples("clean", "train").mean(0), rtol=1e-4)
    assert metrics["psnr"] == pytest.approx(decibels(after, before, high - low), abs=1e-3)


def test_columns_are_found_by_name(table, here):
    rows = np.random.default_rng(1).normal(size=(11, 3))
    write_table(here / "new.csv", ["a", "b", "c"], rows)
    write_table(here / "turned.csv", ["extra", "c", "a", "b"], [[0, row[2], row[0], row[1]] for row in rows])
    for name in ("new", "turned"):
        assert call("reconstruct", table, f"{name}.csv", "--out", name).code == 0
    np.testing.assert_array_equal(samples("new", "train"), samples("turned", "train"))
    assert DataSet.open("turned").card.x.features == ("a", "b", "c")


def test_photos_of_any_size(denoising, here, digits):
    (here / "photos").mkdir()
    for i, sample in enumerate(samples(digits)[:13]):
        Image.fromarray(sample[0] * 15).resize((24, 16)).save(here / "photos" / f"{i:02d}.png")
    answer = call("reconstruct", denoising, "photos", "--out", "clean", "--json").json
    assert answer["metrics"]["rows"] == 13
    assert answer["warnings"][0].startswith("the values of photos may go from 0 to 255")
    assert DataSet.open("clean").card.x.shape == (1, 8, 8)


# --- what is refused


def test_what_an_earlier_reconstruct_wrote_makes_way(denoising, digits, here):
    for split in ("val", "test"):
        assert call("reconstruct", denoising, digits, "--split", split, "--out", "clean").code == 0
    assert DataSet.open("clean").card.splits.keys() == {"test"}
    assert not (here / "clean" / "val-000000.tar").exists()
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_holds_something_else(denoising, digits, data):
    assert one_line("reconstruct", denoising, digits, "--out", data) == (
        f"--out {data} holds other files. Name a new or empty folder."
    )


def test_a_file_in_the_place_of_the_folder(denoising, digits, here):
    (here / "file").write_text("in the way")
    assert one_line("reconstruct", denoising, digits, "--out", "file") == "--out file is a file. Name a folder."
    assert one_line("reconstruct", denoising, digits, "--out", "file/x").startswith("cannot create the folder ")


def test_a_result_over_what_it_is_made_of(denoising, digits):
    assert call("reconstruct", denoising, digits, "--split", "val", "--out", "clean").code == 0
    assert one_line("reconstruct", denoising, "clean", "--out", "clean") == (
        "--out clean is the data set to be reconstructed. Name another folder."
    )


def test_a_corruption_that_was_never_trained_with(finetuned, digits):
    assert one_line("reconstruct", finetuned, digits, "--corrupt", "--out", "clean") == (
        "--corrupt: the run tiny was trained without a corruption of its input. Leave --corrupt out, "
        "or pretrain with a noise among model.regularizers."
    )


def test_bounds_of_a_model_without_draws(denoising, digits):
    assert one_line("reconstruct", denoising, digits, "--draws", 3, "--out", "clean") == (
        "--draws 3: bounds of log p(x) need a random q(z|x) to draw codes from, but encoder builtins/mlp gives point. "
        "Leave --draws out, or pretrain with model.encoder.posterior: diag or full."
    )


def test_pictures_of_what_is_no_image(table):
    assert one_line("reconstruct", table, "table.csv", "--images", "--out", "clean") == (
        "--images: a sample is a vector of shape (3,); a PNG is an image of 1, 3 or 4 channels. Leave --images out."
    )


def test_samples_of_another_shape(denoising, unlabelled):
    message = one_line("reconstruct", denoising, unlabelled, "--out", "clean")
    assert message == f"{unlabelled} holds samples of shape (7,); the model takes (1, 8, 8)."


def test_a_split_that_does_not_exist(denoising, digits):
    assert one_line("reconstruct", denoising, digits, "--split", "vall", "--out", "clean") == (
        "data set 'digits' has no split 'vall'; it has train, val and test. Did you mean val?"
    )


def test_data_that_is_not_there(denoising, here):
    before = snapshot(here)
    answer = call("reconstruct", denoising, "nowhere", "--out", "clean")
    assert answer.code == 2
    assert "error: nowhere is neither a file, nor a folder, nor a known name." in answer.stderr
    assert snapshot(here) == before


def test_a_run_that_is_none(here, digits):
    assert one_line("reconstruct", "runs/none", digits, "--out", "clean").startswith("runs/none is no run folder")


def test_a_run_before_pretraining_is_done(denoising, digits):
    stage = denoising / "pretrain" / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"status": "unfinished"}))
    assert one_line("reconstruct", denoising, digits, "--out", "clean") == (
        f"{denoising} holds no pretrained model. Run `ssl-ae pretrain RECIPE --out {denoising}` first, "
        "or name the run that it was finetuned from."
    )


def test_data_that_turn_out_damaged_on_the_way(denoising, data, digits):
    """The first split is done by then, and an earlier result is there: it stays."""
    assert call("reconstruct", denoising, digits, "--split", "val", "--out", "clean").code == 0
    shard = data / "test-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5_000])
    assert one_line("reconstruct", denoising, data, "--out", "clean").startswith(f"{shard} has ")
