"""Wrong data, labels and run folders: exit code 2, one message with place, value and cure, and no file touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call, one_line, refused
from PIL import Image

# The data


def test_a_truncated_shard(recipe, data):
    shard = data / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5_000])
    message = one_line("pretrain", recipe({"data.path": str(data)}))
    assert message.startswith(f"{shard} has ")
    assert message.endswith("it is truncated or replaced. Pack the source again, or restore the file.")


def test_a_truncated_validation_shard(recipe, data):
    """Found before the first step, not after the last."""
    shard = data / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5_000])
    assert one_line("pretrain", recipe({"data.path": str(data)})).startswith(f"{shard} has ")


@pytest.mark.parametrize("words", [["--sequential"], ["--joint"], ["--end-to-end", "--set", "finetune.init=scratch"]])
def test_a_validation_shard_that_is_damaged_after_pretraining(recipe, data, here, words):
    path = recipe({"data.path": str(data)})
    assert call("pretrain", path, "--epochs", 1).code == 0
    shard = data / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5_000])
    assert one_line("finetune", path, *words, "--set", "pretrain.epochs=1").startswith(f"{shard} has ")


def test_a_shard_whose_rows_do_not_match_the_card(recipe, data):
    card = json.loads((data / "card.json").read_text())
    card["splits"]["train"]["rows"] += 1
    card["splits"]["train"]["shards"][0]["rows"] += 1
    (data / "card.json").write_text(json.dumps(card))
    assert one_line("pretrain", recipe({"data.path": str(data)})) == (
        f"{data}/train-000000.tar holds 1298 samples, but the card says 1299. Pack the source again."
    )


def test_a_card_that_contradicts_itself(recipe, data):
    card = json.loads((data / "card.json").read_text())
    card["splits"]["train"]["rows"] += 1
    (data / "card.json").write_text(json.dumps(card))
    message = one_line("pretrain", recipe({"data.path": str(data)}))
    assert message == f"{data}/card.json: split 'train' has 1299 rows, but its shards have 1298. Pack the source again."


def test_a_shard_that_is_gone(recipe, data):
    (data / "train-000000.tar").unlink()
    assert one_line("pretrain", recipe({"data.path": str(data)})) == (
        f"{data}/train-000000.tar: No such file or directory. Pack the source again, or restore the file."
    )


def test_data_that_is_not_there(recipe, here):
    assert one_line("pretrain", recipe({"data.path": "nowhere"})) == (
        "nowhere is no folder. Make the data set with `ssl-ae data pack SOURCE nowhere`."
    )


def test_data_without_shards(recipe, here):
    (here / "empty").mkdir()
    assert one_line("pretrain", recipe({"data.path": "empty"})).startswith("empty holds neither a card.json nor .tar shards.")


def test_other_data_than_the_run_was_made_with(recipe, data, finetuned):
    stored = finetuned / "recipe.yaml"
    card = json.loads((data / "card.json").read_text())
    stored.write_text(stored.read_text().replace(card_fingerprint(stored), "f" * 64))
    message = one_line("evaluate", finetuned)
    assert "is not the data this run was made with" in message
    assert card["name"] == "digits"


def card_fingerprint(stored: Path) -> str:
    line = next(line for line in stored.read_text().splitlines() if "card_sha256" in line)
    return line.split(": ")[1]


def test_images_of_mixed_size(here):
    for i, size in enumerate([(5, 7), (11, 7)]):
        (here / "photos" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(here / "photos" / "cat" / f"{i}.png")
    message = one_line("data", "pack", "photos", "out")
    assert "7x5" in message
    assert "7x11" in message
    assert "--size" in message


@pytest.mark.parametrize("cell", ["NaN", "", "inf", "tall"])
def test_a_cell_that_is_no_number(here, cell):
    (here / "table.csv").write_text(f"height,width\n1.5,2\n2.5,3\n{cell},4\n")
    message = one_line("data", "pack", "table.csv", "out")
    assert message.startswith("table.csv: ")
    assert "row 3" in message
    assert "'height'" in message


def test_a_label_column_that_is_not_there(here):
    (here / "table.csv").write_text("height,species\n1.5,a\n")
    assert "Did you mean species?" in one_line("data", "pack", "table.csv", "out", "--label", "specie")


def test_an_empty_folder(here):
    (here / "empty").mkdir()
    message = refused("data", "pack", "empty", "out")  # one line for each kind of source that there is
    assert message.startswith("empty is an empty folder. Put the samples into it; a source is one of:")


def test_a_source_that_is_not_there(here):
    assert refused("data", "pack", "nowhere", "out").startswith("nowhere is neither a file, nor a folder, nor a known name.")


def test_a_task_that_does_not_exist(here, digits):
    assert one_line("data", "pack", "digits", "out", "--task", "clases") == (
        "--task clases: expected classes, regression or multilabel. Did you mean classes?"
    )


@pytest.mark.parametrize("size", ["64", "0x5", "axb", "5x"])
def test_a_size_that_is_none(here, digits, size):
    assert one_line("data", "pack", digits, "out", "--size", size) == f"--size {size}: expected HEIGHTxWIDTH, such as 64x64."


# The labels


def test_a_label_for_a_key_that_does_not_exist(recipe, finetuned, here):
    (here / "labels.csv").write_text("key,label\ndigits-00000001,3\ndigits-99999999,4\n")
    assert one_line("finetune", recipe(), "--labels", "labels.csv") == (
        "labels.csv: 1 of 2 keys are not in the data set, for example 'digits-99999999'. Use the keys of the packed data."
    )


def test_a_label_that_is_no_class(recipe, finetuned, here):
    (here / "labels.csv").write_text("key,label\ndigits-00000001,three\n")
    assert "row 1: label 'three' is not a class of this data set" in one_line("finetune", recipe(), "--labels", "labels.csv")


def test_a_label_file_that_is_not_there(recipe, finetuned):
    assert one_line("finetune", recipe(), "--labels", "labels.csv").startswith("labels.csv does not exist")


def test_a_label_file_of_another_kind(recipe, finetuned, here):
    (here / "labels.txt").write_text("key,label\n")
    assert one_line("finetune", recipe(), "--labels", "labels.txt") == (
        "labels.txt: a label table is a .csv or a .parquet file with columns key and label."
    )


def test_fewer_labels_in_a_class_than_asked(recipe, finetuned):
    message = one_line("finetune", recipe({"data.labels.per_class": 1_000}))
    assert message.startswith("data.labels: class '0' has ")
    assert message.endswith("labels in the train split, but 1000 are asked. Ask for fewer, or label more samples.")


@pytest.mark.parametrize("labels", ["0", "-3"])
def test_a_number_of_labels_below_one(recipe, finetuned, labels):
    assert f"data.labels.total = {labels}: expected greater than or equal to 1." in one_line(
        "finetune", recipe(), "--labels", labels
    )


@pytest.mark.parametrize("words", [["--sequential"], ["--joint"]])
def test_no_labels_at_all(recipe, unlabelled, words):
    fields = {"data.path": str(unlabelled), "data.labels": "all", "model.decoder.likelihood": "gaussian"}
    path = recipe(fields)
    assert call("pretrain", path, "--epochs", 1).code == 0
    message = one_line("finetune", path, "--set", "pretrain.epochs=1", *words)
    assert message.startswith(f"no row of the train split of {unlabelled} has a label, and finetune needs some.")
    assert message.endswith("--labels FILE.")


# The run folder


@pytest.mark.parametrize("command", ["extract", "evaluate"])
def test_a_run_that_is_not_there(here, command):
    assert one_line(command, "runs/tiny") == (
        "runs/tiny is no run folder: it has no recipe.yaml. Run `ssl-ae pretrain RECIPE --out runs/tiny` first."
    )


def test_extract_before_pretrain(finetuned):
    shutil.rmtree(finetuned / "pretrain")
    assert one_line("extract", finetuned) == (
        f"{finetuned} holds no pretrained model. Run `ssl-ae pretrain RECIPE --out {finetuned}` first, or name a run with --from."
    )


@pytest.mark.parametrize("words", [[], ["--joint"]])
def test_finetune_before_pretrain(recipe, words):
    assert one_line("finetune", recipe(), *words).startswith("runs/tiny holds no pretrained model. ")


def test_finetune_from_a_run_that_is_not_there(recipe):
    assert one_line("finetune", recipe(), "--from", "runs/other").startswith("runs/other holds no pretrained model. ")


def test_evaluate_before_finetune(pretrained):
    assert one_line("evaluate", pretrained) == (
        f"{pretrained} holds no finetuned model. Run `ssl-ae finetune RECIPE --out {pretrained}` first."
    )


def test_predict_before_finetune(pretrained, digits):
    assert one_line("predict", pretrained, digits, "--out", "p.parquet") == (
        f"{pretrained} holds no finetuned model. Run `ssl-ae finetune RECIPE --out {pretrained}` first."
    )


def test_predict_on_data_that_is_not_there(finetuned):
    message = refused("predict", finetuned, "nowhere", "--out", "p.parquet")  # one line for each kind of source that there is
    assert message.startswith("nowhere is neither a file, nor a folder, nor a known name.")


def test_predictions_that_are_no_parquet(finetuned, digits):
    assert one_line("predict", finetuned, digits, "--out", "p.csv") == (
        "--out p.csv: the predictions are a Parquet file; give a name that ends in .parquet."
    )


def test_predict_on_samples_of_another_shape(finetuned, unlabelled):
    message = one_line("predict", finetuned, unlabelled, "--out", "new/p.parquet")
    assert message == f"{unlabelled} holds samples of shape (7,); the model takes (1, 8, 8)."


def test_extract_of_samples_of_another_shape(finetuned, unlabelled):
    message = one_line("extract", finetuned, "--data", unlabelled)
    assert message.startswith(f"{unlabelled} holds samples of shape (7,)")


@pytest.mark.parametrize("command", ["extract", "evaluate"])
def test_an_unknown_split(finetuned, command):
    assert one_line(command, finetuned, "--split", "tset") == (
        "data set 'digits' has no split 'tset'; it has train, val and test. Did you mean test?"
    )


@pytest.mark.parametrize("words", [["evaluate"], ["predict", "digits", "--out", "p.parquet"]])
def test_an_unknown_method(finetuned, words):
    message = one_line(words[0], finetuned, *words[1:], "--method", "joint-alpha0.1")
    assert message == (f"--method joint-alpha0.1: {finetuned} has sequential and joint-alpha0.01. Did you mean joint-alpha0.01?")


def test_two_modes_at_once(recipe, finetuned):
    assert one_line("finetune", recipe(), "--joint", "--end-to-end") == ("--joint and --end-to-end: choose one mode at a time.")


def test_alpha_where_it_has_no_effect(recipe, finetuned):
    assert one_line("finetune", recipe(), "--sequential", "--alpha", "0.5") == (
        "--alpha 0.5 has no effect in mode sequential; it is the weight of l_X in --joint."
    )


def test_alpha_where_the_recipe_says_sequential(recipe, finetuned):
    assert "has no effect in mode sequential" in one_line("finetune", recipe(), "--alpha", "0.5")


def test_a_run_folder_in_use_by_another_process(recipe, here, finetuned):
    code = "import sys, pathlib; from ssl_ae.runs import lock\n"
    code += "with lock(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(finetuned)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for words in (["pretrain", recipe()], ["extract", finetuned], ["finetune", recipe()], ["evaluate", finetuned]):
                message = one_line(*words)
                assert message.startswith("the run folder ")
                assert f" is in use by process {holder.pid} on " in message
                assert message.endswith("Wait until it is done, or choose another folder with --out.")
        finally:
            holder.communicate("\n")
    assert call("pretrain", recipe()).code == 0


@pytest.mark.parametrize("command", ["pretrain", "run"])
def test_a_run_folder_that_cannot_be_made(recipe, here, command):
    (here / "file").write_text("in the way")
    message = one_line(command, recipe(), "--out", "file/run")
    assert message == "cannot create the folder file/run: Not a directory. Choose another place for it."


def test_a_data_folder_that_cannot_be_made(here):
    (here / "file").write_text("in the way")
    message = one_line("data", "pack", "digits", "file/out")
    assert message == f"cannot create the folder {here}/file: File exists. Choose another place for it."


def test_predictions_where_no_folder_can_be(finetuned, digits, here):
    (here / "file").write_text("in the way")
    assert one_line("predict", finetuned, digits, "--out", "file/p.parquet").startswith("cannot create the folder file")


def test_a_pretraining_of_another_recipe_in_the_same_folder(recipe, finetuned):
    message = refused("pretrain", recipe({"model.latent_dim": 7, "pretrain.optimizer": {"lr": 0.5}}))
    assert message.splitlines() == [
        "runs/tiny/pretrain was made from another recipe:",
        "  model.latent_dim: 5 -> 7",
        "  pretrain.optimizer.lr: 0.001 -> 0.5",
        "Start it over with --restart, or keep both with --out ANOTHER_FOLDER.",
    ]


def test_a_finetuning_on_the_checkpoint_of_another_recipe(recipe, finetuned):
    path = recipe({"model.latent_dim": 7, "name": "other"})
    message = refused("finetune", path, "--from", "runs/tiny", "--out", "runs/other")
    assert message.splitlines() == [
        "runs/tiny/pretrain is the checkpoint of another recipe:",
        "  model.latent_dim: 5 -> 7",
        "Finetune with the recipe it was made with, pretrain this one with --out ANOTHER_FOLDER, or set finetune.init: scratch.",
    ]


def test_a_damaged_model(finetuned):
    path = finetuned / "finetune" / "joint-alpha0.01" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert one_line("evaluate", finetuned).startswith(f"{path} is damaged: its sha256 is not that in stage.json.")


def test_a_component_of_another_version(finetuned):
    stored = finetuned / "recipe.yaml"
    stored.write_text(
        stored.read_text().replace("  encoder builtins/mlp:\n    version: 1\n", "  encoder builtins/mlp:\n    version: 2\n")
    )
    message = one_line("extract", finetuned)
    assert "encoder builtins/mlp was stored by version 2 and version 1 is installed. Install ssl-ae " in message


def test_a_store_that_cannot_work(recipe, monkeypatch):
    monkeypatch.delenv("SSL_AE_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    assert "is a folder, and MLflow keeps no runs in folders any more" in one_line("pretrain", recipe())


def test_a_way_of_tracking_that_does_not_exist(recipe, monkeypatch):
    monkeypatch.setenv("SSL_AE_TRACKING", "journals")
    assert one_line("pretrain", recipe()) == ("SSL_AE_TRACKING = 'journals': expected live or journal. Did you mean journal?")
