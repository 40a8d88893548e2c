"""Wrong input: exit code 2, one message that names place, value, what is allowed and the cure, and no file touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Answer, call, snapshot, spawn, write_yaml
from PIL import Image


def refused(*words: object, by=call) -> str:
    """The message of a command that must refuse its input and leave the current folder as it is."""
    before = snapshot(Path.cwd())
    answer: Answer = by(*words)
    assert answer.code == 2, answer
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("error:") == 1
    assert "Traceback" not in answer.stderr
    assert snapshot(Path.cwd()) == before
    return answer.stderr.removeprefix("error: ").rstrip("\n")


def one_line(*words: object) -> str:
    message = refused(*words)
    assert "\n" not in message
    return message


@pytest.fixture
def data(here, digits) -> Path:
    """A copy of the data set that a test may damage."""
    return shutil.copytree(digits, here / "digits")


@pytest.fixture
def unlabelled(here) -> Path:
    """61 vectors of 7 numbers between -3 and 3 without labels."""
    x = np.random.default_rng(0).uniform(-3, 3, (61, 7)).astype(np.float32)
    np.savez(here / "x.npz", x=x)
    assert call("data", "pack", "x.npz", "vectors").code == 0
    return here / "vectors"


# The recipe


def test_an_unknown_key(recipe):
    path = recipe({"model.latent_dimm": 3})
    assert one_line("pretrain", path) == (
        f"{path}: model.latent_dimm: unknown key; allowed: latent_dim, samples, encoder, decoder, regularizers and head."
        " Did you mean latent_dim?"
    )


def test_a_wrong_type(recipe):
    path = recipe({"model.latent_dim": "many"})
    message = one_line("pretrain", path)
    assert message.startswith(f'{path}: model.latent_dim = "many": expected a valid integer')


def test_a_value_that_is_not_allowed(recipe):
    path = recipe({"finetune.mode": "joined"})
    assert one_line("finetune", path) == (
        f'{path}: finetune.mode = "joined": expected sequential, joint, alternate or end-to-end. Did you mean joint?'
    )


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        ({"per_class": "ten"}, 'data.labels.per_class = "ten": expected a valid integer'),
        ({"per_class": 3, "total": 30}, "data.labels"),
        ({"per_clas": 3}, "data.labels.per_clas: unknown key; allowed: per_class, total and seed. Did you mean per_class?"),
        (7, "data.labels = 7: expected"),
    ],
)
def test_a_budget_of_labels_that_makes_no_sense(recipe, labels, place):
    assert place in one_line("finetune", recipe({"data.labels": labels}))


@pytest.mark.parametrize("stages", [["pretrian"], [{"stage": "pretrian"}]])
def test_a_stage_that_does_not_exist(recipe, stages):
    message = one_line("run", recipe({"stages": stages}))
    assert "stages.0" in message
    assert "Did you mean pretrain?" in message


def test_several_things_wrong_are_one_message_of_a_line_each(recipe):
    path = recipe({"seed": -1, "model.latent_dim": 0, "pretrain.epoch": 3})
    places = [line.split(": ")[1] for line in refused("pretrain", path).splitlines()]
    assert places == ["seed = -1", "model.latent_dim = 0", "pretrain.epoch"]


def test_an_unknown_component(recipe):
    path = recipe({"model.encoder.name": "mpl"})
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.name = 'mpl': there is no encoder of this name; installed: ")
    assert message.endswith("Did you mean mlp?")


def test_an_unknown_option_of_a_component(recipe):
    path = recipe({"model.encoder.width": [3]})
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.width: unknown key; allowed: ")
    assert message.endswith("Did you mean widths?")


@pytest.fixture
def second_mlp(here, monkeypatch) -> None:
    """An installed distribution whose plugin also has an encoder called mlp."""
    folder = here / "site"
    (folder / "rival-7.0.dist-info").mkdir(parents=True)
    (folder / "rival-7.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 7.0\n")
    (folder / "rival-7.0.dist-info" / "entry_points.txt").write_text("[ssl_ae]\nrival = rival\n")
    (folder / "rival.py").write_text(
        "import ssl_ae\nfrom ssl_ae_builtins.mlp import MlpEncoder\n"
        "class Mlp(MlpEncoder):\n    name = 'mlp'\n"
        "@ssl_ae.hookimpl\ndef ssl_ae_encoders():\n    return [Mlp]\n"
    )
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(folder)


def test_a_short_name_with_two_owners(recipe, second_mlp):
    path = recipe()
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.name = 'mlp': encoder 'mlp' is ambiguous: builtins/mlp (ssl-ae ")
    assert message.endswith(") and rival/mlp (rival 7.0). Write the full name.")


def test_the_full_name_of_one_of_two_owners_works(recipe, second_mlp):
    assert call("pretrain", recipe({"model.encoder.name": "rival/mlp"}), "--epochs", 1).code == 0


def test_kl_on_a_point(recipe):
    path = recipe({"model.encoder.posterior": "point"})
    assert one_line("pretrain", path) == (
        f"{path}: kl needs a random posterior, but encoder builtins/mlp returns Point. "
        "Set model.encoder.posterior: diag, or remove kl."
    )


def test_bernoulli_on_data_outside_the_unit_interval(recipe, unlabelled):
    path = recipe({"data.path": str(unlabelled)})
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.decoder.likelihood = bernoulli: expects values in [0, 1], but data.scale = standard")
    assert message.endswith("Set data.scale: range, or the gaussian likelihood.")


def test_bernoulli_on_pixels_that_are_not_scaled(recipe):
    message = one_line("pretrain", recipe({"data.scale": "none"}))  # the digits' pixels go from 0 to 16
    assert "data.scale = none gives [0, 16]" in message


def test_a_table_head_with_joint(recipe, pretrained):
    message = one_line("finetune", recipe({"model.head.name": "logistic"}), "--joint")
    assert message.startswith("model.head.name = builtins/logistic: is fitted on stored latents")
    assert message.endswith("Take a differentiable head (softmax, mlp), or --sequential.")


def test_a_recipe_that_is_not_there(recipe, here):
    recipe()
    assert one_line("pretrain", here / "recip.yaml") == f"there is no recipe {here}/recip.yaml. Did you mean {here}/recipe.yaml?"


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "\tname: tiny"])
def test_a_recipe_that_is_no_yaml(here, text):
    (here / "bad.yaml").write_text(text)
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml is no YAML: ")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_a_recipe_that_is_no_mapping(here, text):
    (here / "bad.yaml").write_text(text)
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml: a recipe is a mapping with at least `name` and `data`")


def test_a_recipe_that_is_no_text(here):
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml cannot be read: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.latent_dim", "--set model.latent_dim: expected KEY=VALUE, as in --set model.latent_dim=16."),
        ("=3", "--set =3: expected KEY=VALUE, as in --set model.latent_dim=16."),
        ("seed.x=3", "--set seed.x=3: seed is 0, which has no fields. Set seed itself."),
        ("model.regularizers.7.weight=3", "'7' is no position in a list of 1; positions start at 0."),
        ("model.latent_dim=[", "--set model.latent_dim=[: the value is no YAML: "),
        ("model.latentdim=3", "Did you mean latent_dim?"),
    ],
)
def test_an_override_that_cannot_be(recipe, text, message):
    assert message in one_line("pretrain", recipe({"seed": 0}), "--set", text)


def test_no_epochs(recipe):
    assert "pretrain.epochs = 0: expected greater than or equal to 1." in one_line("pretrain", recipe(), "--epochs", 0)


def test_a_device_that_this_machine_lacks(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = one_line("pretrain", recipe({"device": "cuda"}))
    assert message.startswith("device = cuda: torch finds none on this machine; available: ")


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
        f"{finetuned} holds no pretrained model. Run `ssl-ae pretrain RECIPE --out {finetuned}` first, "
        "or name a run with --from."
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
    assert message == (
        f"--method joint-alpha0.1: {finetuned} has sequential and joint-alpha0.01. Did you mean joint-alpha0.01?"
    )


def test_two_modes_at_once(recipe, finetuned):
    assert one_line("finetune", recipe(), "--joint", "--end-to-end") == (
        "--joint and --end-to-end: choose one mode at a time."
    )


def test_alpha_where_it_has_no_effect(recipe, finetuned):
    assert one_line("finetune", recipe(), "--sequential", "--alpha", "0.5") == (
        "--alpha 0.5 has no effect in mode sequential; it is the weight of l_X in --joint."
    )


def test_alpha_where_the_recipe_says_sequential(recipe, finetuned):
    assert "has no effect in mode sequential" in one_line("finetune", recipe(), "--alpha", "0.5")


def test_a_run_folder_in_use_by_another_process(recipe, here, finetuned):
    code = "import sys, pathlib; from ssl_ae.runs import lock\nwith lock(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
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
        "Finetune with the recipe it was made with, pretrain this one with --out ANOTHER_FOLDER, "
        "or set finetune.init: scratch.",
    ]


def test_a_damaged_model(finetuned):
    path = finetuned / "finetune" / "joint-alpha0.01" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert one_line("evaluate", finetuned).startswith(f"{path} cannot be read: ")


def test_a_component_of_another_version(finetuned):
    stored = finetuned / "recipe.yaml"
    stored.write_text(stored.read_text().replace("  encoder builtins/mlp:\n    version: 1\n", "  encoder builtins/mlp:\n    version: 2\n"))
    message = one_line("extract", finetuned)
    assert "encoder builtins/mlp was stored by version 2 and version 1 is installed. Install ssl-ae " in message


def test_a_store_that_cannot_work(recipe, monkeypatch):
    monkeypatch.delenv("SSL_AE_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    assert "is a folder, and MLflow keeps no runs in folders any more" in one_line("pretrain", recipe())


def test_a_way_of_tracking_that_does_not_exist(recipe, monkeypatch):
    monkeypatch.setenv("SSL_AE_TRACKING", "journals")
    assert one_line("pretrain", recipe()) == (
        "SSL_AE_TRACKING = 'journals': expected live or journal. Did you mean journal?"
    )


# As users meet it: a process of its own


def test_the_process_says_the_same(recipe, here):
    path = recipe({"model.encoder.posterior": "point"})
    assert refused("pretrain", path, by=spawn) == one_line("pretrain", path)


def test_a_flag_that_does_not_exist(recipe):
    answer = call("pretrain", recipe(), "--epoch", "3")
    assert answer.code == 2
    assert "No such option: --epoch" in answer.stderr


def test_recipes_are_refused_before_torch_is_imported(here):
    path = write_yaml(here / "recipe.yaml", {"name": "tiny", "data": {"path": "data"}, "pretrain": {"epoch": 3}})
    code = f"""
import sys
sys.argv = ["ssl-ae", "pretrain", {str(path)!r}]
from ssl_ae.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, "mlflow" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "False False\n")
