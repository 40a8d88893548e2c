"""pretrain: what it leaves in the run folder, and what its weights depend on."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import yaml
from command_line import call, snapshot
from PIL import Image
from safetensors import safe_open

from ssl_ae import distributed
from ssl_ae.data.dataset import DataSet
from ssl_ae.stages.training_run import final_metrics
from ssl_ae.training import Progress


def test_the_run_folder(recipe, here):
    answer = call("pretrain", recipe(), "--json").json
    assert answer["status"] == "done"
    stage = here / "runs" / "tiny" / "pretrain"
    assert {path.name for path in stage.iterdir()} == {
        "checkpoint", "figures", "journal", "card.json", "metrics.json", "model.safetensors", "recipe.yaml", "stage.json",
    }  # fmt: skip
    # 1,298 rows in steps of 128: epoch 1 ends at step ceil(1298 / 128) = 11, epoch 2 at ceil(2596 / 128) = 21
    assert {path.name for path in (stage / "checkpoint").iterdir()} == {"step-0000000011", "step-0000000021"}
    assert {path.name for path in (stage / "figures").iterdir()} >= {"learning_curves.png", "reconstructions.png", "filters.png"}
    assert json.loads((stage / "metrics.json").read_text()) == answer["metrics"]
    assert {path.name for path in stage.parent.iterdir()} == {"pretrain", "journal", "card.json", "recipe.yaml", ".lock"}


def test_labels_are_not_used(recipe, here, digits):
    """The same bytes with the label table gone."""
    bare = shutil.copytree(digits, here / "bare")
    card = json.loads((bare / "card.json").read_text())
    (bare / "labels.parquet").unlink()
    (bare / "card.json").write_text(json.dumps(card | {"y": None, "labels_sha256": None}))
    assert call("pretrain", recipe(), "--out", "a").code == 0
    assert call("pretrain", recipe({"data.path": str(bare), "data.labels": "all"}), "--out", "b").code == 0
    assert (here / "a/pretrain/model.safetensors").read_bytes() == (here / "b/pretrain/model.safetensors").read_bytes()


def test_the_same_run_in_two_folders_gives_the_same_bytes(recipe, here, pretrained):
    assert call("pretrain", recipe({"name": "another"})).code == 0
    first, second = pretrained / "pretrain", here / "runs" / "another" / "pretrain"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    with safe_open(second / "model.safetensors", "np") as file:
        assert file.metadata() == {"fingerprint": json.loads((second / "stage.json").read_text())["fingerprint"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"data.labels": "all"},
        {"data.labels": {"total": 500, "seed": 7}},
        {"finetune.alpha": 0.5, "finetune.mode": "joint"},
        {"finetune.epochs": 7, "finetune.ema": 0.9},
        {"model.head": {"name": "knn"}},
        {"data.residency": "stream"},
        {"name": "renamed"},
        {"stages": ["pretrain"]},
    ],
)
def test_what_pretraining_does_not_read_never_invalidates_it(recipe, pretrained, fields):
    before = snapshot(pretrained)
    answer = call("pretrain", recipe(fields), "--out", pretrained, "--json")
    assert answer.json["status"] == "skipped", answer.stderr
    assert snapshot(pretrained) == before


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"seed": 1}, "  seed: 0 -> 1"),
        ({"pretrain.epochs": 3}, "  pretrain.epochs: 2 -> 3"),
        ({"model.regularizers": []}, "  model.regularizers.0.name: builtins/kl -> nothing"),
        ({"model.decoder.likelihood": "gaussian"}, "  model.decoder.likelihood: bernoulli -> gaussian"),
        ({"precision": "bf16"}, "  precision: fp32 -> bf16"),
    ],
)
def test_what_pretraining_reads_does(recipe, pretrained, fields, line):
    answer = call("pretrain", recipe(fields), "--out", pretrained)
    assert answer.code == 2
    assert line in answer.stderr.splitlines()


@pytest.mark.parametrize(("native", "taken"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_what_the_device_computes_in(recipe, here, monkeypatch, native, taken):
    """Stored and compared as that, so a run never mixes the two, and goes on in it on a device of the other kind."""
    monkeypatch.setattr(distributed, "computes_bf16", lambda device: native)
    made = call("pretrain", recipe({"precision": "auto"}), "--out", "run", "--json")
    assert f", cpu, {taken}, data resident" in made.stderr
    assert made.json["warnings"] == []
    assert yaml.safe_load((here / "run" / "recipe.yaml").read_text())["precision"] == taken
    assert call("pretrain", recipe({"precision": taken}), "--out", "run", "--json").json["status"] == "skipped"
    monkeypatch.setattr(distributed, "computes_bf16", lambda device: not native)
    assert call("pretrain", recipe({"precision": "auto"}), "--out", "run", "--json").json["status"] == "skipped"
    assert call("finetune", recipe({"precision": "auto"}), "--joint", "--out", "run").code == 0
    (stored,) = (here / "run" / "finetune").glob("*/recipe.yaml")
    assert yaml.safe_load(stored.read_text())["precision"] == taken


def test_bf16_that_is_emulated_is_said_once(recipe, here, monkeypatch):
    monkeypatch.setattr(distributed, "computes_bf16", lambda device: False)
    fields = {"precision": "bf16", "pretrain.epochs": 1, "finetune.mode": "joint", "finetune.epochs": 1}
    warnings = call("run", recipe(fields), "--json").json["warnings"]
    assert sum("torch does not say that this device computes in it itself" in warning for warning in warnings) == 1


def test_restart_makes_it_anew_under_the_changed_recipe(recipe, pretrained):
    before = (pretrained / "pretrain" / "model.safetensors").read_bytes()
    answer = call("pretrain", recipe({"model.latent_dim": 7}), "--restart", "--json")
    assert answer.json["status"] == "done"
    assert (pretrained / "pretrain" / "model.safetensors").read_bytes() != before
    assert yaml.safe_load((pretrained / "recipe.yaml").read_text())["model"]["latent_dim"] == 7


def test_restart_of_a_recipe_that_is_refused_keeps_what_there_is(recipe, pretrained):
    before = snapshot(pretrained)
    assert call("pretrain", recipe({"data.scale": "none"}), "--restart").code == 2
    assert snapshot(pretrained) == before


def test_a_stored_recipe_is_a_recipe(recipe, pretrained, here):
    """It says every default, full names, versions and absolute paths, and makes the same run again."""
    stored = yaml.safe_load((pretrained / "recipe.yaml").read_text())
    assert stored["model"]["encoder"]["name"] == "builtins/mlp"
    assert stored["model"]["decoder"]["widths"] == [17]  # the encoder's, mirrored
    assert stored["components"]["encoder builtins/mlp"]["version"] == 1
    assert stored["components"]["encoder builtins/mlp"]["distribution"].startswith("ssl-ae ")
    assert stored["data"]["path"].startswith("/")
    assert len(stored["data"]["card_sha256"]) == 64
    assert call("pretrain", pretrained / "recipe.yaml", "--out", pretrained, "--json").json["status"] == "skipped"
    assert call("pretrain", pretrained / "recipe.yaml", "--out", "again").code == 0
    model = "pretrain/model.safetensors"
    assert (here / "again" / model).read_bytes() == (pretrained / model).read_bytes()


def test_streaming_trains_as_resident_data_does(recipe, here, pretrained):
    """The order of the rows is the seed's alone, so to the same bits: a resumed run may find less free memory than before."""
    answer = call("pretrain", recipe({"data.residency": "stream"}), "--out", "streamed", "--json")
    assert "data streamed" in answer.stderr
    streamed, resident = here / "streamed", pretrained
    assert (streamed / "pretrain/model.safetensors").read_bytes() == (resident / "pretrain/model.safetensors").read_bytes()


def test_shards_made_elsewhere_train_without_packing(recipe, here, digits):
    """One PNG and one class a sample, as `webdataset`'s tools write them."""
    data = DataSet.open(digits).split("train")
    x, labels = data.read(np.arange(203)), DataSet.open(digits).labels("train")
    (here / "foreign").mkdir()
    for shard in range(2):
        with tarfile.open(here / "foreign" / f"part-{shard:03d}.tar", "w") as tar:
            for row in range(shard, 203, 2):
                png = io.BytesIO()
                Image.fromarray(x[row, 0] * 15).save(png, "png")
                for ending, content in (("png", png.getvalue()), ("cls", str(labels[row]).encode())):
                    info = tarfile.TarInfo(f"{row:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    before = snapshot(here / "foreign")
    path = recipe({"data.path": "foreign", "data.labels": "all"})
    assert call("pretrain", path).code == 0
    answer = call("finetune", path, "--json")
    assert "183 labels of 183 train rows" in answer.stderr  # 203 - floor(203 / 10)
    assert answer.json["metrics"]["val/pca-logistic/accuracy"] > 0.5  # chance is 0.1
    assert snapshot(here / "foreign") == before


def test_a_named_data_set_is_packed_on_first_use(recipe, here):
    path = recipe({"data.path": "data/digits", "data.source": "digits"})
    first = call("pretrain", path)
    assert first.code == 0
    assert "packing digits into data/digits (first use)" in first.stderr
    assert "packing" not in call("pretrain", path, "--out", "again").stderr


def test_early_stopping_stops(recipe, here):
    fields = {
        "pretrain.epochs": 40,
        "pretrain.early_stopping": {"patience": 1},
        "pretrain.optimizer": {"name": "sgd", "lr": 1e-12},
    }
    answer = call("pretrain", recipe(fields), "--json").json  # at this rate nothing moves: the second epoch is no better
    steps = sorted(path.name for path in (here / "runs/tiny/pretrain/checkpoint").iterdir())
    assert answer["status"] == "done"
    assert int(steps[-1].removeprefix("step-")) < 40 * 1_298 / 128 / 2


def test_a_metric_that_nothing_measures_is_told_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr("ssl_ae.stepping.Stepper.make", lambda *_: pytest.fail("a step was made"))
    for stage, found in (("pretrain", "kl, val/loss and val/mse"), ("finetune", "val/accuracy")):
        fields = {f"{stage}.early_stopping": {"metric": "val/acuracy"}, "finetune.init": "scratch", "finetune.mode": "joint"}
        answer = call(stage, recipe(fields))
        assert answer.code == 2
        assert "early_stopping.metric = val/acuracy: this stage measures val/" in answer.stderr
        assert found in answer.stderr


def test_the_figures_of_an_early_stop_are_of_the_weights_that_are_kept():
    """Four epochs, of which the second was the best: its validation is told, with the last reading of training."""
    losses = [(4, 3.0), (8, 1.0), (12, 2.0), (16, 2.5)]
    history = [
        entry for step, loss in losses for entry in ({"step": step, "train/x": loss / 2}, {"step": step, "val/loss": loss})
    ]
    stopped = Progress(step=16, epoch=4, best=1.0, best_epoch=2, history=history)
    assert final_metrics(stopped) == {"train/x": 1.25, "val/loss": 1.0}
    assert final_metrics(Progress(step=16, epoch=4, history=history)) == {"train/x": 1.25, "val/loss": 2.5}


def test_a_regularizer_on_layers_that_are_not_there_is_refused(recipe, here):
    """It would do nothing, and nobody would know."""
    noise = [{"name": "gaussian_noise", "layers": ["h2"]}]
    answer = call("pretrain", recipe({"model.regularizers": noise}))
    assert answer.code == 2
    assert "model.regularizers.0 (gaussian_noise).layers = ['h2']: the model has no such layer; it has input, h1" in answer.stderr
    assert not (here / "runs").exists()


def test_a_run_is_read_by_the_recipe_of_its_pretraining(recipe, here):
    """Another stage may have come first, with another model."""
    other = recipe({"model.latent_dim": 3, "finetune.init": "scratch", "finetune.epochs": 1}, name="other.yaml")
    assert call("finetune", other, "--joint").code == 0
    assert call("pretrain", recipe()).code == 0
    assert call("extract", "runs/tiny", "--split", "val").code == 0
    assert call("finetune", other, "--joint", "--restart").code == 0
    assert call("extract", "runs/tiny", "--split", "val", "--scores").code == 0
