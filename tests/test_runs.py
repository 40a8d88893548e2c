"""Run folders: the lock, the states of a stage, and the diff of what it was made from."""

import json
import os

import pytest

from ssl_ae import runs
from ssl_ae.errors import CheckpointError
from ssl_ae.runs import StageFolder, diff, lock

FIELDS = {"seed": 0, "model": {"widths": [7, 5], "name": "mlp"}}


@pytest.fixture
def stage(tmp_path):
    return StageFolder(tmp_path / "run" / "pretrain")


def test_a_stage_is_new_then_resumed_then_done(stage):
    assert stage.state(FIELDS) == "new"
    assert not stage.path.exists()  # looking changes nothing
    assert stage.begin(FIELDS) == "new"
    assert stage.begin(FIELDS) == "resume"
    stage.finish({"val/loss": 0.5})
    assert stage.begin(FIELDS) == "done"
    assert stage.done
    assert stage.metrics() == {"val/loss": 0.5}


def test_other_fields_are_refused_with_a_diff(stage):
    stage.begin(FIELDS)
    with pytest.raises(CheckpointError) as caught:
        stage.begin({"seed": 3, "model": {"widths": [7], "name": "mlp", "bias": True}})
    assert str(caught.value).splitlines()[1:-1] == [
        "  seed: 0 -> 3",
        "  model.widths.1: 5 -> nothing",
        "  model.bias: nothing -> True",
    ]
    assert stage.state(FIELDS) == "resume"


def test_restart_forgets(stage):
    stage.begin(FIELDS)
    (stage.path / "stray").write_text("")
    assert stage.state({"seed": 3}, restart=True) == "new"
    assert (stage.path / "stray").exists()
    assert stage.begin({"seed": 3}, restart=True) == "new"
    assert not (stage.path / "stray").exists()


def test_a_folder_that_is_no_stage_keeps_its_files(stage):
    stage.path.mkdir(parents=True)
    (stage.path / "thesis.tex").write_text("")
    assert stage.begin(FIELDS) == "new"
    assert (stage.path / "thesis.tex").exists()


def test_the_fingerprint_depends_on_the_fields_alone(stage, tmp_path):
    other = StageFolder(tmp_path / "elsewhere")
    stage.begin(FIELDS)
    other.begin({"model": {"name": "mlp", "widths": (7, 5)}, "seed": 0})  # other order, tuple for list
    assert stage.fingerprint == other.fingerprint
    assert len(stage.fingerprint) == 64


def test_nan_does_not_make_fields_differ_from_themselves(stage):
    stage.begin({"a": float("nan")})
    assert stage.begin({"a": float("nan")}) == "resume"


def test_a_damaged_record(stage):
    stage.begin(FIELDS)
    (stage.path / runs.STAGE).write_text("{")
    with pytest.raises(CheckpointError, match="Start the stage over with --restart"):
        stage.begin(FIELDS)
    assert stage.begin(FIELDS, restart=True) == "new"


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


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / runs.LOCK).write_text("")
    (run / runs.HOLDER).write_text('{"pid": 1, "host": "gone"}')
    with lock(run):
        assert json.loads((run / runs.HOLDER).read_text())["pid"] == os.getpid()


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
