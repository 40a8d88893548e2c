"""Checkpoints: whole or not at all, damage noticed whatever the byte, the one before taken instead."""

from fractions import Fraction

import pytest
import torch
from safetensors import safe_open

from ssl_ae import checkpoint as checkpoints
from ssl_ae.checkpoint import Checkpoint, load_checkpoint, read_weights, save_checkpoint, write_weights
from ssl_ae.errors import CheckpointError

FILES = ["model.safetensors", "state.pt", "progress.json", "manifest.json"]


def made(step):
    torch.manual_seed(step)
    return Checkpoint(
        weights={"b": torch.randn(3, 5), "a": torch.randn(7).double(), "n": torch.tensor(step)},
        state={"optimizers": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}]},
        progress={"step": step, "epoch": 1, "best": None, "history": [{"step": step, "train/loss": 0.5}]},
    )


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


def assert_is(found, step):
    expected = made(step)
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert found.weights["a"].dtype == torch.float64
    assert found.state == expected.state
    assert found.progress == expected.progress


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", made(7))
    warnings = []
    assert_is(load_checkpoint(tmp_path / "checkpoint", warnings), 7)
    assert not warnings


def test_nothing_saved_is_nothing_to_load(tmp_path):
    assert load_checkpoint(tmp_path / "absent", []) is None


def test_the_two_newest_are_kept_and_nothing_else(tmp_path):
    for step in (3, 20, 100, 1000):
        save_checkpoint(tmp_path, made(step))
        assert len(list(tmp_path.iterdir())) <= checkpoints.KEPT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000100", "step-0000001000"]
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_same_step_may_be_saved_twice(tmp_path):
    save_checkpoint(tmp_path, made(7))
    save_checkpoint(tmp_path, made(7))
    assert_is(load_checkpoint(tmp_path, []), 7)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, made(3))

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, made(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000003"]
    assert_is(load_checkpoint(tmp_path, []), 3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.95])
def test_a_flipped_bit_falls_back_to_the_one_before(tmp_path, name, place):
    save_checkpoint(tmp_path, made(3))
    newest = save_checkpoint(tmp_path, made(4)) / name
    content = newest.read_bytes()
    position = int(place * len(content))
    while name == "manifest.json" and not content[position : position + 1].isalnum():
        position += 1  # a flip between words of JSON may well be harmless
    flip(newest, position)
    warnings = []
    assert_is(load_checkpoint(tmp_path, warnings), 3)
    assert len(warnings) == 1
    assert "checkpoint step-0000000004 is damaged" in warnings[0]
    assert "going on from the one before it" in warnings[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])], ids=["lost", "cut"]
)
def test_a_lost_or_cut_file_falls_back(tmp_path, name, damage):
    save_checkpoint(tmp_path, made(3))
    damage(save_checkpoint(tmp_path, made(4)) / name)
    warnings = []
    assert_is(load_checkpoint(tmp_path, warnings), 3)
    assert len(warnings) == 1


def test_an_empty_manifest_vouches_for_nothing(tmp_path):
    save_checkpoint(tmp_path, made(3))
    newest = save_checkpoint(tmp_path, made(4))
    (newest / "manifest.json").write_text("{}")
    flip(newest / "model.safetensors", -1)
    assert_is(load_checkpoint(tmp_path, []), 3)


def test_when_all_are_damaged_nothing_starts_over_by_itself(tmp_path):
    for step in (3, 4):
        flip(save_checkpoint(tmp_path, made(step)) / "state.pt", -1)
    with pytest.raises(CheckpointError, match=r"(?s)every checkpoint is damaged.*step-0000000004.*step-0000000003.*--restart"):
        load_checkpoint(tmp_path, [])


def test_state_is_never_unpickled_freely(tmp_path):
    """A whole checkpoint, manifest and all, whose state holds an object of any class is refused."""
    bad = made(3)
    bad.state["object"] = Fraction(1, 3)
    save_checkpoint(tmp_path, bad)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        load_checkpoint(tmp_path, [])


# --- a finished stage's weights


def test_bytes_depend_on_weights_and_fingerprint_alone(tmp_path):
    weights = made(3).weights
    turned = {name: weights[name] for name in reversed(weights)} | {"b": weights["b"].t().contiguous().t()}
    for i, given in enumerate((weights, turned, weights)):
        write_weights(tmp_path / str(i) / "model.safetensors", given, "f" * 64 if i < 2 else "e" * 64)
    a, b, c = ((tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3))
    assert a == b
    assert a != c
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"fingerprint": "f" * 64}
    assert all(torch.equal(value, weights[name]) for name, value in read_weights(tmp_path / "0" / "model.safetensors").items())
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["model.safetensors"]


def test_weights_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "model.safetensors")
