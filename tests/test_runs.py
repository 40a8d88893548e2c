"""Run folders: the lock, the states of a stage, and the diff of what it was made from."""

import json
import os
import socket

import pytest

from ssl_ae import files, runs
from ssl_ae.errors import CheckpointError
from ssl_ae.runs import Holder, Inputs, StageFolder, diff, lock

FIELDS = {"seed": 0, "model": {"widths": [7, 5], "name": "mlp"}}
INPUTS = Inputs(FIELDS)


@pytest.fixture
def stage(tmp_path):
    return StageFolder(tmp_path / "run" / "pretrain")


def test_a_stage_is_new_then_resumed_then_done(stage):
    assert stage.state(INPUTS) == "new"
    assert not stage.path.exists()  # looking changes nothing
    assert stage.begin(INPUTS) == "new"
    assert stage.begin(INPUTS) == "resume"
    stage.finish({"val/loss": 0.5})
    assert stage.begin(INPUTS) == "done"
    assert stage.done
    assert stage.metrics() == {"val/loss": 0.5}


def test_other_fields_are_refused_with_a_diff(stage):
    stage.begin(INPUTS)
    with pytest.raises(CheckpointError) as caught:
        stage.begin(Inputs({"seed": 3, "model": {"widths": [7], "name": "mlp", "bias": True}}))
    assert str(caught.value).splitlines()[1:-1] == [
        "  seed: 0 -> 3",
        "  model.widths.1: 5 -> nothing",
        "  model.bias: nothing -> True",
    ]
    assert stage.state(INPUTS) == "resume"


def test_restart_forgets(stage):
    stage.begin(INPUTS)
    (stage.path / "stray").write_text("")
    assert stage.state(Inputs({"seed": 3}), restart=True) == "new"
    assert (stage.path / "stray").exists()
    assert stage.begin(Inputs({"seed": 3}), restart=True) == "new"
    assert not (stage.path / "stray").exists()


def test_a_folder_that_is_no_stage_keeps_its_files(stage):
    stage.path.mkdir(parents=True)
    (stage.path / "thesis.tex").write_text("")
    assert stage.begin(INPUTS) == "new"
    assert (stage.path / "thesis.tex").exists()


def test_the_fingerprint_depends_on_the_fields_alone(stage, tmp_path):
    other = StageFolder(tmp_path / "elsewhere")
    stage.begin(INPUTS)
    other.begin(Inputs({"model": {"name": "mlp", "widths": (7, 5)}, "seed": 0}))  # other order, tuple for list
    assert stage.fingerprint == other.fingerprint
    assert len(stage.fingerprint) == 64


def test_nan_does_not_make_fields_differ_from_themselves(stage):
    stage.begin(Inputs({"a": float("nan")}))
    assert stage.begin(Inputs({"a": float("nan")})) == "resume"


def test_a_damaged_record(stage):
    stage.begin(INPUTS)
    (stage.path / runs.STAGE).write_text("{")
    with pytest.raises(CheckpointError, match="Start the stage over with --restart"):
        stage.begin(INPUTS)
    assert stage.begin(INPUTS, restart=True) == "new"


def test_diff_of_equals_is_empty():
    assert diff(FIELDS, FIELDS) == ""
    assert diff({"a": None}, {}) == "  a: None -> nothing"


def test_only_one_holds_the_lock(tmp_path):
    run = tmp_path / "run"
    with lock(run):
        (run / "kept").write_text("")
        holder = json.loads((run / runs.HOLDER).read_text())
        assert holder["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "), lock(run):
            pass
        assert (run / runs.HOLDER).exists()
    with lock(run):
        pass
    assert {path.name for path in run.iterdir()} == {"kept", runs.LOCK}


def left_by(run, **holder):
    """A folder whose holder is gone, as far as the kernel of this machine can tell."""
    run.mkdir(exist_ok=True)
    (run / runs.LOCK).write_text("")
    (run / runs.HOLDER).write_text(json.dumps(vars(Holder.here()) | holder))
    return run


@pytest.mark.parametrize("holder", [{"pid": 1}, {"boot": "before the power cut"}, {"host": "this one, in a container"}])
def test_what_a_killed_process_of_this_machine_left_is_taken_over_aloud(tmp_path, holder, monkeypatch):
    run, told = left_by(tmp_path / "run", **holder), []
    monkeypatch.setattr(runs, "SILENT_SECONDS", 1e6)  # nobody waits: the kernel knows
    with lock(run, told.append):
        assert Holder.of(run) == Holder.here()
    (message,) = told
    pid, host = holder.get("pid", os.getpid()), holder.get("host", socket.gethostname())
    assert message == f"{run} was left by process {pid} on {host}, which is gone: going on in its place"
    assert not (run / runs.HOLDER).exists()


def test_another_machine_that_is_silent_is_gone(tmp_path, monkeypatch):
    run, told = left_by(tmp_path / "run", pid=7, host="node7", boot="its own"), []
    monkeypatch.setattr(runs, "SILENT_SECONDS", 0.05)
    with lock(run, told.append):
        assert Holder.of(run) == Holder.here()
    assert ["watching" in message for message in told] == [True, False]
    assert told[1].endswith("process 7 on node7, which is gone: going on in its place")


def test_another_machine_that_gives_signs_of_life_is_not_disturbed(tmp_path, monkeypatch):
    """Where the file system keeps the kernel's lock from other machines: they see the record being touched."""
    run = tmp_path / "run"
    node7 = Holder(7, "node7", "its own")
    run.mkdir()
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(runs, "SILENT_SECONDS", 30)
    with node7.beating(run):
        with pytest.raises(CheckpointError, match="in use by process 7 on node7"), lock(run):
            pass
        assert Holder.of(run) == node7


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"pid": 3}'])
def test_a_record_that_is_no_record_hinders_nobody(tmp_path, torn):
    run = left_by(tmp_path / "run")
    (run / runs.HOLDER).write_text(torn)
    with lock(run):
        assert Holder.of(run) == Holder.here()


def test_what_killed_writers_left_goes_with_the_next_one_and_nothing_else(tmp_path):
    run = left_by(tmp_path / "run", pid=1)
    stale = [".recipe.yaml.0123abcd.tmp", "pretrain/checkpoint/.step-0000000011.0123abcd.tmp/state.pt"]
    kept = ["recipe.yaml", ".hidden", "pretrain/checkpoint/step-0000000003/state.pt", "mine/.notes.0123abcd.tmp"]
    for name in [*stale, *kept]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "latents").mkdir()
    with files.whole_file(run / "latents" / "part") as living, lock(run):
        assert living.exists()
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert there == {*kept, runs.LOCK, "latents/part"}


def test_a_folder_made_for_a_lock_alone_is_gone_afterwards(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "runs" / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    with lock(tmp_path / "runs" / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert list((tmp_path / "runs").iterdir()) == []
