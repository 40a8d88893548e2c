"""A killed pretraining: what the process says, and that the same command goes on to the same bits."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from command_line import call, start, with_fields, write_yaml
from conftest import TINY

LONG = {"pretrain.epochs": 60}  # seconds of training: 609 steps and a checkpoint every 11
SIGINT = pytest.param(signal.SIGINT, marks=pytest.mark.slow)  # the handler is SIGTERM's


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits) -> bytes:
    """The model that nobody interrupts, made in another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_TRACKING", "journal")
        folder = tmp_path_factory.mktemp("uninterrupted")
        path = write_yaml(folder / "recipe.yaml", with_fields(TINY, {"data.path": str(digits), **LONG}))
        assert call("pretrain", path, "--out", folder / "run").code == 0
    return (folder / "run" / "pretrain" / "model.safetensors").read_bytes()


def killed(path: Path, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a pretraining that gets a signal after its first checkpoint."""
    with start("pretrain", path) as process:
        end = time.monotonic() + 60
        while not list(run.glob("pretrain/checkpoint/step-*")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert not (run / "pretrain" / "model.safetensors").exists()
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_to_the_same_bits(recipe, here, uninterrupted, number):
    path, run = recipe(LONG), here / "runs" / "tiny"
    code, stderr = killed(path, run, number)
    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 75
        (message,) = [line for line in stderr.splitlines() if line.startswith("stopped after step ")]
        assert message.endswith("the place is saved. Run the same command to go on.")
        assert "error: " not in stderr
        assert "Traceback" not in stderr

    changed = call("pretrain", path, "--set", "pretrain.optimizer.lr=0.01")
    assert changed.code == 2
    assert "  pretrain.optimizer.lr: 0.001 -> 0.01" in changed.stderr.splitlines()

    resumed = call("pretrain", path, "--json")
    assert resumed.json["status"] == "done"
    assert "resuming pretrain at step " in resumed.stderr
    assert (run / "pretrain" / "model.safetensors").read_bytes() == uninterrupted
    assert not list(run.rglob("*.tmp"))


def interrupted(stage: Path, epoch_end: str) -> bytes:
    """Turn a finished stage into one that was killed after a checkpoint; returns the model it had."""
    whole = (stage / "model.safetensors").read_bytes()
    (stage / "model.safetensors").unlink()
    (stage / "metrics.json").unlink()
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"status": "unfinished"}))
    for step in (stage / "checkpoint").iterdir():
        if step.name > epoch_end:
            shutil.rmtree(step)
    return whole


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "progress.json", "manifest.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe, pretrained, name):
    whole = interrupted(pretrained / "pretrain", "step-0000000021")
    flip_a_bit(pretrained / "pretrain" / "checkpoint" / "step-0000000021" / name)
    resumed = call("pretrain", recipe(), "--json")
    assert "checkpoint step-0000000021 is damaged" in resumed.json["warnings"][0]
    assert "resuming pretrain at step 11 of 21" in resumed.stderr
    assert (pretrained / "pretrain" / "model.safetensors").read_bytes() == whole


def test_with_every_checkpoint_damaged_it_does_not_start_over_unasked(recipe, pretrained):
    interrupted(pretrained / "pretrain", "step-0000000021")
    for step in (pretrained / "pretrain" / "checkpoint").iterdir():
        flip_a_bit(step / "state.pt")
    answer = call("pretrain", recipe())
    assert answer.code == 2
    assert "every checkpoint is damaged" in answer.stderr
    assert "Start over with --restart." in answer.stderr
    assert call("pretrain", recipe(), "--restart").code == 0


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_a_finetuning_goes_on_to_the_same_bits(recipe, finetuned, mode):
    stage = finetuned / "finetune" / {"sequential": "sequential", "joint": "joint-alpha0.01"}[mode]
    whole = interrupted(stage, "step-0000000011")
    resumed = call("finetune", recipe(), f"--{mode}", "--json")
    assert f"resuming finetune {stage.name} at step 11 of 21" in resumed.stderr
    assert (stage / "model.safetensors").read_bytes() == whole
    assert resumed.json["method"] == stage.name
