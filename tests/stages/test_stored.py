"""A run that is read again meets the plugins of today: the same versions, an upgrade, or an error that says what to install."""

import pytest
import torch
from command_line import call
from ssl_ae_builtins.mlp import MlpEncoder

from ssl_ae import files, recipe, runs
from ssl_ae.checkpoint import read_weights
from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import CheckpointError
from ssl_ae.registry import Registry
from ssl_ae.stages.stored import read_model, resolve_stored


def stored(run):
    made_with = recipe.load(run / runs.RECIPE)
    return resolve_stored(made_with, Registry.discover(), DataSet.open(made_with.data.path).card, "recipe.yaml")


def test_another_version_names_the_distribution_to_install(pretrained, monkeypatch):
    monkeypatch.setattr(MlpEncoder, "version", 2)
    told = r"encoder builtins/mlp was stored by version 1 and version 2 is installed\. Install ssl-ae"
    with pytest.raises(CheckpointError, match=told):
        stored(pretrained)
    assert call("extract", pretrained).code == 2


def test_a_class_that_upgrades_reads_what_its_older_version_stored(pretrained, monkeypatch):
    """Version 2 stands for one that stores the negative of its weights: reading version 1 must turn the signs, and no others."""

    def upgrade(cls, version, state):
        assert version == 1
        return {name: -value for name, value in state.items()}

    before = read_weights(pretrained / "pretrain" / runs.MODEL)
    monkeypatch.setattr(MlpEncoder, "version", 2)
    monkeypatch.setattr(MlpEncoder, "upgrades_from", frozenset({1}))
    monkeypatch.setattr(MlpEncoder, "upgrade", classmethod(upgrade))
    after = read_model(stored(pretrained), pretrained / "pretrain" / runs.MODEL)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], -value if name.startswith("encoder.") else value)


def test_a_plugin_that_is_gone_is_named(pretrained):
    path = pretrained / runs.RECIPE
    text = path.read_text().replace("name: builtins/mlp", "name: gone/ksparse", 1)
    files.write_text(path, text)
    answer = call("extract", pretrained)
    assert answer.code == 2
    assert "This run was made with ssl-ae" in answer.stderr
    assert "install what is missing" in answer.stderr


def test_a_run_made_on_another_device_is_read_here_aloud(pretrained):
    path = pretrained / runs.RECIPE
    files.write_text(path, path.read_text().replace("device: cpu", "device: mps"))
    if torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    answer = call("extract", pretrained, "--split", "val")
    assert answer.code == 0
    assert "made on mps, which this machine lacks; going on on" in answer.stderr
