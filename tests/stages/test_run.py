"""run: the stages of a recipe in order, skipping what is done."""

import pytest
from command_line import call, snapshot

ALL = [
    "pretrain",
    "extract",
    {"stage": "finetune", "set": {"finetune.mode": "sequential"}},
    {"stage": "finetune", "set": {"finetune.mode": "joint", "finetune.alpha": 0.5}},
    "evaluate",
]


@pytest.fixture
def both(recipe):
    return recipe({"stages": ALL})


def test_the_whole_recipe_and_then_nothing_twice(both, here, rendered):
    first = call("run", both, "--json")
    answer = first.json
    assert answer["status"] == "done"
    assert answer["method"] == "joint-alpha0.5"
    assert answer["methods"].keys() == {"sequential", "joint-alpha0.5"}
    outputs = answer["outputs"]
    assert outputs["run"] == "runs/tiny"
    assert outputs["pretrain-model"] == "runs/tiny/pretrain/model.safetensors"
    assert outputs["extract-train"] == "runs/tiny/latents/train"
    assert outputs["finetune-sequential-model"] == "runs/tiny/finetune/sequential/model.safetensors"
    assert outputs["finetune-joint-alpha0.5-model"] == "runs/tiny/finetune/joint-alpha0.5/model.safetensors"
    assert outputs["report"] == "runs/tiny/evaluate/test/metrics.json"
    for path in outputs.values():
        assert (here / path).exists()
        assert path in first.stderr  # the final table says the place of every file

    made = {name: files for name, files in snapshot(here / "runs").items() if "evaluate" not in name and "journal" not in name}
    again = call("run", both, "--json").json
    assert again["status"] == "skipped"
    assert again["outputs"] == outputs
    assert again["metrics"] == answer["metrics"]
    assert made.items() <= snapshot(here / "runs").items()


def test_it_is_the_commands_one_by_one(recipe, finetuned, here):
    path = recipe({"stages": ["pretrain", "extract", "finetune", {"stage": "finetune", "set": {"finetune.mode": "joint"}}]})
    assert call("run", path, "--out", "runs/again").code == 0
    for model in ("pretrain", "finetune/sequential", "finetune/joint-alpha0.01"):
        ours, theirs = (here / "runs" / run / model / "model.safetensors" for run in ("again", "tiny"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_every_stage_is_checked_before_the_first_runs(recipe, here):
    path = recipe({"stages": ["pretrain", {"stage": "finetune", "set": {"finetune.mod": "joint"}}]})
    answer = call("run", path)
    assert answer.code == 2
    assert "finetune.mod: unknown key" in answer.stderr
    assert not (here / "runs").exists()


def test_components_of_every_stage_are_checked_before_the_first_runs(recipe, here):
    path = recipe({"stages": ["pretrain", {"stage": "finetune", "set": {"model.head.name": "sofmax"}}]})
    answer = call("run", path)
    assert answer.code == 2
    assert "Did you mean softmax?" in answer.stderr
    assert not (here / "runs").exists()


def test_epochs_of_every_training_stage(recipe, here):
    answer = call("run", recipe({"stages": ["pretrain", "finetune"]}), "--epochs", 1)
    assert answer.code == 0
    for stage in ("pretrain", "finetune/sequential"):
        (step,) = (here / "runs/tiny" / stage / "checkpoint").iterdir()
        assert step.name == "step-0000000011"  # ceil(1298 / 128)


def test_flags_win_over_what_a_stage_sets_itself_and_set_says_where_it_does_not(recipe, here):
    own = {"data.labels": {"per_class": 2}, "finetune.epochs": 1}
    path = recipe({"stages": ["pretrain", {"stage": "finetune", "set": own}], "pretrain.epochs": 1})
    said = call("run", path, "--labels", 50)
    assert "finetune sequential: 50 labels of" in said.stderr
    assert "has no effect" not in said.stderr
    said = call("run", path, "--out", "runs/other", "--set", "data.labels.seed=3", "--set", "seed=5")
    assert "finetune sequential: 20 labels of" in said.stderr
    assert said.stderr.count("has no effect") == 1
    assert "--set data.labels.seed: has no effect on stage finetune, which sets data.labels itself" in said.stderr


def test_no_stage_at_all(recipe, here):
    answer = call("run", recipe(), "--set", "stages=[]")
    assert answer.code == 2
    assert "stages = []: expected at least one of pretrain, extract, finetune, predict and evaluate." in answer.stderr
    assert not (here / "runs").exists()


def test_evaluate_alone_is_never_skipped(recipe, finetuned):
    assert call("run", recipe({"stages": ["evaluate"]}), "--json").json["status"] == "done"


def test_a_head_that_cannot_be_trained_so_is_found_before_the_first_stage_runs(recipe, here):
    path = recipe({"stages": ["pretrain", {"stage": "finetune", "set": {"model.head.name": "knn", "finetune.mode": "joint"}}]})
    answer = call("run", path)
    assert answer.code == 2
    assert "finetune.mode must be sequential" in answer.stderr
    assert not (here / "runs").exists()
