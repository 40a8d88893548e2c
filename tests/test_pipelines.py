"""Every recipe that ships does what it says, from its first stage to its last: few rows and one epoch of each here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import call
from sklearn.datasets import load_digits

RECIPES = sorted((Path(__file__).parents[1] / "pipelines").glob("*.yaml"))
ROWS = 300


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with data/NAME for every data set that recipes read without a source: MNIST's shape and names, few rows.

    And what recipes on another run's latents would pack, whichever recipes run: codes of the size that `mnist_m1` gives.
    """
    folder = tmp_path_factory.mktemp("pipelines")
    digits = load_digits()
    images = np.kron(digits.images[:ROWS] / 16 * 255, np.ones((1, 3, 3))).astype(np.uint8)  # 8 x 8 -> 24 x 24
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
    x, y = np.split(images, [ROWS - 60]), np.split(digits.target[:ROWS], [ROWS - 60])
    np.savez(folder / "mnist.npz", x_train=x[0], y_train=y[0], x_test=x[1], y_test=y[1])
    assert call("data", "pack", folder / "mnist.npz", folder / "data" / "mnist").code == 0
    codes = [(part.reshape(len(part), -1)[:, ::15][:, :50] / 100).astype(np.float32) for part in x]
    np.savez(folder / "codes.npz", x_train=codes[0], y_train=y[0], x_test=codes[1], y_test=y[1])
    assert call("data", "pack", folder / "codes.npz", folder / "data" / "mnist-m1").code == 0
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_stage_of_every_recipe_runs(path, packed, monkeypatch):
    monkeypatch.chdir(packed)
    monkeypatch.setenv("SSL_AE_TRACKING", "journal")
    tree = yaml.safe_load(path.read_text())
    few = ["--epochs", 1, "--set", "finetune.baselines=false", "--set", "device=cpu"]
    if isinstance(tree["data"].get("labels"), dict) and "total" in tree["data"]["labels"]:
        few += ["--set", "data.labels={total: 50}"]  # more than this may be more than there are rows
    if "slice_epochs" in tree.get("pretrain", {}):
        few += ["--set", "pretrain.slice_epochs=1"]
    answer = call("run", path, "--json", *few)
    assert answer.code == 0, answer.stderr
    assert answer.json["status"] == "done"
    losses = [value for name, value in answer.json["metrics"].items() if value is None]
    assert not losses  # JSON writes null for what is not finite
    run = packed / "runs" / tree["name"]
    assert (run / "pretrain" / "model.safetensors").exists()
    assert list((run / "pretrain" / "figures").glob("*.png"))


def test_there_are_recipes_for_the_techniques():
    assert len(RECIPES) >= 14


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is(path):
    """The head comment names its source and what was measured; the run folder is called as the file is."""
    text = path.read_text()
    head = text[: text.index("name:")]
    assert head.startswith("# ")
    assert len(head.splitlines()) >= 2
    assert yaml.safe_load(text)["name"].replace("-", "_") == path.stem
