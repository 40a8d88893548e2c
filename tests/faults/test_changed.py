"""Going on with something changed: refused field by field; `--force` carries what no weight depends on, aloud and on record."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import call, refused, snapshot
from conftest import TINY
from faults.store_kit import flip_a_bit

from ssl_ae import __version__
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import LabelTable

STEADY = {"pretrain.schedule": {"name": "constant"}, "finetune.schedule": {"name": "constant"}}


def interrupt(stage: Path, last: str = "step-0000000011") -> None:
    """Turn a finished stage into one that was killed after a checkpoint."""
    for name in ("model.safetensors", "metrics.json"):
        (stage / name).unlink()
    edit(stage, status="unfinished", sha256={})
    for step in (stage / "checkpoint").iterdir():
        if step.name > last:
            shutil.rmtree(step)


def record(stage: Path) -> dict:
    return json.loads((stage / "stage.json").read_text())


def edit(stage: Path, **fields: object) -> None:
    (stage / "stage.json").write_text(json.dumps(record(stage) | fields))


def weights(stage: Path) -> str:
    return snapshot(stage)["model.safetensors"]


def parameters(stage: Path) -> dict:
    """The weights without the fingerprint that goes with them."""
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(stage / "model.safetensors").items()}


@pytest.fixture
def stopped(pretrained):
    """runs/tiny, stopped in the middle of its pretraining."""
    interrupt(pretrained / "pretrain")
    return pretrained / "pretrain"


UNSAFE = {
    "seed": (1, "seed: 0 -> 1"),
    "model.latent_dim": (6, "model.latent_dim: 5 -> 6"),
    "model.encoder.widths": ([17, 7], "model.encoder.widths.1: nothing -> 7"),
    "model.regularizers": ([{"name": "kl", "weight": 0.5}], "model.regularizers.0.weight: 1.0 -> 0.5"),
    "pretrain.batch_size": (64, "pretrain.batch_size: 128 -> 64"),
    "pretrain.optimizer.lr": (0.01, "pretrain.optimizer.lr: 0.001 -> 0.01"),
    "pretrain.epochs": (9, "pretrain.epochs: 2 -> 9"),  # the schedule is a cosine: it would have been slower from the start
    "pretrain.micro_batches": (2, "pretrain.micro_batches: 1 -> 2"),
    "precision": ("bf16", "precision: fp32 -> bf16"),
}


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_what_the_weights_depend_on_is_refused_with_a_diff(recipe, stopped, force):
    for field, (value, line) in UNSAFE.items():
        path = recipe({field: value})
        message = refused("pretrain", path, *force)
        assert f"  {line}" in message.splitlines()
        assert "Start it over with --restart, or keep both with --out ANOTHER_FOLDER." in message
        carried = [text for text in message.splitlines() if text.startswith("--force does not carry ")]
        assert [line.partition(":")[0] in text for text in carried] == [True] * len(force)


def test_one_unsafe_change_holds_back_the_safe_ones_with_it(recipe, stopped):
    message = refused("pretrain", recipe({"seed": 1, "pretrain.log_every": 3}), "--force")
    assert message.splitlines()[1:3] == ["  seed: 0 -> 1", "  pretrain.log_every: 50 -> 3"]
    assert "--force does not carry seed: " in message


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_other_data_are_refused(recipe, stopped, data, force):
    card = json.loads((data / "card.json").read_text())
    card["x"]["range"] = [0, 17]
    (data / "card.json").write_text(json.dumps(card))
    message = refused("pretrain", recipe({"data.path": "digits"}), *force)
    assert [line.partition(":")[0] for line in message.splitlines()[1:-1]] == ["  data.card_sha256"]


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_another_version_of_a_component_is_refused(recipe, stopped, force):
    fields = record(stopped)["fields"]
    fields["components"]["encoder builtins/mlp"] = "0"
    edit(stopped, fields=fields)
    message = refused("pretrain", recipe(), *force)
    assert message.splitlines()[1].startswith("  components.encoder builtins/mlp: 0 -> ")


@pytest.mark.slow
def test_other_labels_and_heads_do_not_concern_a_pretraining(recipe, stopped):
    path = recipe({"data.labels": "all", "model.head": {"name": "mlp"}, "finetune.epochs": 7})
    assert "resuming pretrain at step 11 of 21" in call("pretrain", path).stderr


# --- what may pass


@pytest.mark.slow
def test_another_release_of_a_plugin_goes_on_only_when_told(recipe, pretrained, here):
    whole = weights(pretrained / "pretrain")
    stage = pretrained / "pretrain"
    assert record(stage)["software"].keys() == {"ssl-ae", "torch"}
    edit(stage, software=record(stage)["software"] | {"ssl-ae": "0.0.9"})
    assert call("pretrain", recipe(), "--json").json["status"] == "skipped"  # a finished model stays one
    interrupt(stage)
    assert refused("pretrain", recipe()).splitlines()[1] == f"  software.ssl-ae: 0.0.9 -> {__version__}"
    answer = call("pretrain", recipe(), "--force", "--json")
    assert answer.json["status"] == "done"
    assert f"  software.ssl-ae: 0.0.9 -> {__version__}" in answer.json["warnings"][0]
    assert record(stage)["forced"] == [{"software.ssl-ae": ["0.0.9", __version__]}]
    assert weights(stage) == whole


def test_what_is_read_on_the_way_may_change(recipe, pretrained):
    stage = pretrained / "pretrain"
    whole = parameters(stage)
    interrupt(stage)
    path = recipe({"pretrain.log_every": 3, "pretrain.max_nonfinite_steps": 5})
    assert refused("pretrain", path)
    answer = call("pretrain", path, "--force", "--json")
    assert "resuming pretrain at step 11 of 21" in answer.stderr
    assert answer.json["warnings"][0].startswith("--force: runs/tiny/pretrain goes on with another recipe:")
    assert record(stage)["forced"] == [{"pretrain.log_every": [50, 3], "pretrain.max_nonfinite_steps": [10, 5]}]
    assert parameters(stage) == whole
    assert call("pretrain", path, "--json").json["status"] == "skipped"  # it is of this recipe now
    assert "log_every: 3" in (stage / "recipe.yaml").read_text()


@pytest.mark.slow
def test_more_epochs_of_a_constant_schedule_end_as_if_they_had_been_asked_for_at_first(recipe, here):
    path = recipe(STEADY)
    assert call("pretrain", path, "--epochs", 4, "--out", "four").code == 0
    assert call("pretrain", path, "--epochs", 2, "--out", "two").code == 0
    assert "pretrain.epochs: 2 -> 4" in refused("pretrain", path, "--epochs", 4, "--out", "two", "--force")  # it is finished
    interrupt(here / "two" / "pretrain")
    assert refused("pretrain", path, "--epochs", 4, "--out", "two")
    assert refused("pretrain", path, "--epochs", 1, "--out", "two", "--force")
    assert call("pretrain", path, "--epochs", 4, "--out", "two", "--force").code == 0
    assert weights(here / "two" / "pretrain") == weights(here / "four" / "pretrain")


@pytest.mark.slow
def test_slices_that_train_for_as_many_epochs_do_not_get_more(recipe, here):
    path = recipe(STEADY | {"model": TINY["model"] | {"encoder": {"name": "stack", "widths": [17]}, "regularizers": []}})
    assert call("pretrain", path, "--epochs", 1).code == 0
    stage = here / "runs" / "tiny" / "pretrain"
    edit(stage, status="unfinished")
    assert "--force does not carry pretrain.epochs" in refused("pretrain", path, "--epochs", 2, "--force")


@pytest.mark.slow
def test_a_finetuning_goes_on_in_its_own_folder(recipe, finetuned):
    stage = finetuned / "finetune" / "joint-alpha0.01"
    whole = parameters(stage)
    interrupt(stage)
    path = recipe({"finetune.log_every": 3})
    answer = call("finetune", path, "--joint", "--force", "--json")
    assert answer.json["method"] == "joint-alpha0.01"
    assert "resuming finetune joint-alpha0.01 at step 11 of 21" in answer.stderr
    assert record(stage)["forced"] == [{"finetune.log_every": [50, 3]}]
    assert parameters(stage) == whole


@pytest.mark.slow
def test_a_finetuning_on_what_it_depends_on_goes_beside_even_with_force(recipe, finetuned):
    before = snapshot(finetuned / "finetune" / "joint-alpha0.01")
    answer = call("finetune", recipe({"finetune.optimizer": {"lr": 0.01}}), "--joint", "--force", "--json").json
    assert answer["method"].startswith("joint-alpha0.01-")
    assert snapshot(finetuned / "finetune" / "joint-alpha0.01") == before


@pytest.mark.slow
def test_run_passes_it_on(recipe, finetuned):
    interrupt(finetuned / "pretrain")
    path = recipe({"pretrain.log_every": 3})
    assert refused("run", path)
    answer = call("run", path, "--force", "--json")
    assert answer.json["status"] == "done"
    assert "--force" in answer.json["warnings"][0]


# --- finished weights


@pytest.mark.parametrize("place", [0.5, *(pytest.param(at, marks=pytest.mark.slow) for at in (0.0, 0.999))])
def test_a_flipped_bit_in_finished_weights_is_noticed_by_whoever_reads_them(recipe, finetuned, digits, place):
    for stage, commands in {
        "pretrain": [("extract", finetuned, "--split", "val"), ("finetune", recipe(), "--joint", "--alpha", 0.5)],
        "finetune/joint-alpha0.01": [("predict", finetuned, digits, "--out", "p.parquet"), ("evaluate", finetuned)],
    }.items():
        path = finetuned / stage / "model.safetensors"
        whole = path.read_bytes()
        flip_a_bit(path, place)
        for words in commands:
            message = refused(*words)
            assert message.startswith((str(path), "runs/tiny"))
            assert "is damaged: its sha256 is not that in stage.json. Put a copy back, or start the stage over" in message
        path.write_bytes(whole)
    assert call("evaluate", finetuned).code == 0


@pytest.mark.slow
def test_new_labels_do_not_make_a_finetuning_go_on(recipe, finetuned, data):
    """Labels that came meanwhile: another folder, so that no head is half of one set and half of another."""
    known = LabelTable.read(data / "labels.parquet", DataSet.open(data).card.y)
    stage = finetuned / "finetune" / "joint-alpha0.01"
    interrupt(stage)
    path = recipe({"data.path": "digits", "data.labels": "all"})
    LabelTable(known.keys[:900], known.labels[:900]).write(data / "labels.parquet")
    answer = call("finetune", path, "--joint", "--force", "--json").json
    assert answer["method"] != stage.name
    assert record(stage)["status"] == "unfinished"
