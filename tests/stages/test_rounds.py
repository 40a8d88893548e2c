"""Rounds: predictions become the guesses of the next network, whose encoder takes the place of the pretrained one."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from safetensors.torch import load_file

from ssl_ae import latents, tables
from ssl_ae.recipe import Rounds, Stage, load, with_fields

JOINT = {
    "model.head": {"name": "softmax"},
    "model.regularizers": [{"name": "kl"}, {"name": "pseudo_labels", "power": 4}],
    "finetune.mode": "joint",
}
ROUND = ["predict", {"stage": "finetune", "set": JOINT}, "extract", "finetune"]
FIELDS = {
    "model.head": {"name": "logistic"},
    "finetune.baselines": False,
    "stages": ["pretrain", "extract", "finetune", {"repeat": 2, "stages": ROUND}],
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encoder_of(stage: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(stage / "model.safetensors").items() if name.startswith("encoder.")}


def in_order(run: Path) -> list[Path]:
    """Finetunings, oldest first."""
    return sorted(
        (path.parent for path in run.glob("finetune/*/stage.json")), key=lambda path: (path / "stage.json").stat().st_mtime_ns
    )


def test_a_round_is_the_ordinary_commands_one_after_another(recipe, here, digits):
    """The same bytes, whether the runner repeats the stages or a user types them."""
    assert call("run", recipe(FIELDS), "--out", "runs/rounds").code == 0

    sequential = recipe(FIELDS, "sequential.yaml")
    joint = recipe(FIELDS | JOINT, "joint.yaml")
    assert call("pretrain", sequential, "--out", "runs/hand").code == 0
    assert call("finetune", sequential, "--out", "runs/hand").code == 0
    encoder = None
    for turn in (1, 2):
        guesses = here / f"guesses-{turn}.parquet"
        assert call("predict", "runs/hand", digits, "--split", "train", "--out", guesses).code == 0
        origin = ["--from", encoder] if encoder else []
        done = call("finetune", joint, "--out", "runs/hand", *origin, "--set", f"data.guesses={guesses}", "--json")
        assert done.code == 0
        encoder = json.loads(done.stdout)["outputs"]["stage"]
        assert call("extract", encoder).code == 0
        assert call("finetune", sequential, "--from", encoder).code == 0  # into the run folder that holds it

    byhand, rounds = in_order(here / "runs/hand"), in_order(here / "runs/rounds")
    assert len(rounds) == 5  # one before, and two a round
    weights = [digest(stage / "model.safetensors") for stage in rounds]
    assert weights == [digest(stage / "model.safetensors") for stage in byhand]
    assert len(set(weights)) == 5

    first, joint_1, then, joint_2, last = rounds
    for network, head in ((joint_1, then), (joint_2, last)):  # the head of a round stands on the encoder of that round
        theirs, ours = encoder_of(network), encoder_of(head)
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        assert latents.read(network / "latents" / "train").z.shape == (1298, 5)
    assert not all(torch.equal(a, b) for a, b in zip(encoder_of(first).values(), encoder_of(then).values(), strict=True))


def test_rounds_that_are_done_are_skipped_and_change_nothing(recipe, here):
    path = recipe(FIELDS | {"stages": ["pretrain", "extract", "finetune", *ROUND]})
    assert call("run", path).code == 0
    before = {p: (digest(p), p.stat().st_mtime_ns) for p in (here / "runs").rglob("*.safetensors")}
    again = call("run", path, "--json")
    assert json.loads(again.stdout)["status"] == "skipped"
    assert {p: (digest(p), p.stat().st_mtime_ns) for p in (here / "runs").rglob("*.safetensors")} == before


def test_guesses_reach_the_rows_that_they_are_of(recipe, here, digits, pretrained):
    """Labels of train in a table of predictions, in another order and for half of the rows, are learned by a network."""
    table = tables.read_parquet(digits / "labels.parquet").columns
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(table["key"]))[:900]
    wanted = np.asarray(table["label"])[rows].astype(int)
    columns = {"key": table["key"][rows]} | {f"p_{c}": (wanted == c).astype(np.float32) for c in range(10)}
    tables.write_parquet(here / "guesses.parquet", columns)
    found = {}
    for name, regularizers in (("none", []), ("guesses", [{"name": "pseudo_labels"}])):
        path = recipe(
            {"model.regularizers": [{"name": "kl"}, *regularizers], "finetune.epochs": 30, "finetune.baselines": False},
            f"{name}.yaml",
        )
        done = call(
            "finetune",
            path,
            "--joint",
            "--from",
            pretrained,
            "--out",
            f"runs/{name}",
            "--set",
            "data.guesses=guesses.parquet",
            "--json",
        )
        assert done.code == 0
        found[name] = json.loads(done.stdout)["metrics"]["val/accuracy"]
    assert found["guesses"] > found["none"] + 0.05  # 30 labels beside 900


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"key": ["a"], "p_0": [1.0]}, "no column 'p_1'"),
        ({"key": ["a"]} | {f"p_{c}": [0.3] for c in range(10)}, "no probabilities of sum 1"),
        ({"key": ["a"]} | {f"p_{c}": [np.nan] for c in range(10)}, "no probabilities of sum 1"),
        ({"key": ["a"]} | {f"p_{c}": [0.1] for c in range(10)}, "none of its 1 keys is a train row"),
        ({"key": ["a"]} | {f"p_{c}": ["x"] for c in range(10)}, "row 1: p_0 = 'x': expected a number"),
        ({"key": ["a", "a"]} | {f"p_{c}": [0.1, 0.1] for c in range(10)}, "the key 'a' stands in several rows"),
    ],
)
def test_a_table_that_holds_no_guesses_is_refused(recipe, here, pretrained, columns, complaint):
    tables.write_parquet(here / "guesses.parquet", {name: np.array(value) for name, value in columns.items()})
    path = recipe(JOINT | {"data.guesses": "guesses.parquet"})
    refused = call("finetune", path, "--from", pretrained, "--out", "runs/x")
    assert refused.code == 2
    assert complaint in refused.stderr
    assert not (here / "runs/x").exists()


def test_who_learns_from_guesses_must_be_given_some(recipe, here, pretrained):
    refused = call("finetune", recipe(JOINT), "--from", pretrained, "--out", "runs/x")
    assert refused.code == 2
    assert "--set data.guesses=" in refused.stderr
    refused = call("run", recipe({"stages": ["pretrain", {"stage": "finetune", "set": JOINT}]}), "--out", "runs/x")
    assert refused.code == 2
    assert not (here / "runs/x").exists()  # told before anything was trained


def test_a_prediction_needs_a_head(recipe, here):
    refused = call("run", recipe({"stages": ["pretrain", "predict"]}))
    assert refused.code == 2
    assert "needs a finetune before it" in refused.stderr
    assert not (here / "runs").exists()


def test_the_grammar_of_rounds(recipe):
    chosen = load(recipe(FIELDS))
    assert chosen.stages[3] == Rounds(repeat=2, stages=("predict", Stage(stage="finetune", set=JOINT), "extract", "finetune"))
    with pytest.raises(Exception, match=r"stages\.1\.repeat = 0"):
        with_fields(chosen, {"stages": ["pretrain", {"repeat": 0, "stages": ["finetune"]}]})
