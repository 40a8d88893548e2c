"""Death between any two steps of a write: the last complete state loads, no half file has a final name, and the same command
ends with the bytes of the one that nobody disturbed."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, snapshot
from faults.store_kit import CALLS, COMMANDS, DEAD, hidden, place, results, run_child

from ssl_ae import files, latents, tables
from ssl_ae.checkpoint import Checkpoint, Saver, load_checkpoint, save_checkpoint
from ssl_ae.data import shards
from ssl_ae.errors import DiskError
from ssl_ae.tracking.journal import Journal, read_events

TORN = [True, pytest.param(False, marks=pytest.mark.slow)]  # a power cut, or a kill that leaves what was written


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(31, 17, generator=generator)}
    return Checkpoint(weights, {"optimizers": [{"m": weights["w"] * step}]}, {"step": step})


def assert_is(found: Checkpoint, step: int) -> None:
    assert found.progress == {"step": step}
    assert torch.equal(found.weights["w"], checkpoint(step).weights["w"])
    assert torch.equal(found.state["optimizers"][0]["m"], checkpoint(step).weights["w"] * step)


def every_point(work: Callable[[], object], fresh: Callable[[], object]) -> range:
    """The points at which `work` may die, counted on a `fresh` place."""
    fresh()
    code, calls = run_child(work)
    assert code == 0
    assert {"fsync", "replace"} <= set(calls) <= set(CALLS)
    return range(len(calls))


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("step", [5, 4], ids=["the next step", "the same step again"])
def test_a_checkpoint(tmp_path, torn, step):
    folder = tmp_path / "checkpoint"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for saved in (3, 4):
            save_checkpoint(folder, checkpoint(saved))

    for point in every_point(lambda: save_checkpoint(folder, checkpoint(step)), fresh):
        fresh()
        assert run_child(lambda: save_checkpoint(folder, checkpoint(step)), point, torn)[0] == DEAD
        files.sweep(folder)  # as the lock of the run does
        assert hidden(folder) == []
        warnings = []
        found = load_checkpoint(folder, warnings)
        assert warnings == []  # nothing under a final name is damaged
        assert found.progress["step"] in (4, step)
        assert_is(found, found.progress["step"])
        save_checkpoint(folder, checkpoint(step))
        assert_is(load_checkpoint(folder, []), step)
        assert len(list(folder.iterdir())) == 2


def part(folder: Path, fact: str = "1") -> None:
    z = np.arange(30, dtype=np.float32).reshape(10, 3)
    columns = {"key": np.array([f"k{i}" for i in range(10)], object), "label": np.arange(10), "latent": z}
    latents.write_part(latents.part_of(folder, 0), columns, {"fact": fact})


def table(folder: Path, fact: str = "1") -> None:
    latents.begin(folder, {"fact": fact})
    part(folder, fact)
    latents.finish(folder, 10, {"fact": fact}, "classes")


def shard(folder: Path) -> None:
    with shards.ShardWriter(folder, "train", block_rows=4) as writer:
        writer.write([f"k{i}" for i in range(10)], np.arange(30, dtype=np.uint8).reshape(10, 3))


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("write", [part, table, shard])
def test_a_file_is_whole_or_not_there(tmp_path, write, torn):
    """A part, a table with its manifest, a shard; made anew, and again where an older one is."""
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole)
    bytes_of = {name: digest for name, digest in snapshot(whole).items() if digest != "folder"}
    folder = tmp_path / "folder"
    for older in (False, True):

        def fresh(older: bool = older) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if older:
                write(folder)

        for point in every_point(lambda: write(folder), fresh):
            fresh()
            assert run_child(lambda: write(folder), point, torn)[0] == DEAD
            left = {name: digest for name, digest in snapshot(folder).items() if not name.startswith(".")}
            assert left.items() <= bytes_of.items()
            if (folder / latents.MANIFEST).exists():
                assert len(latents.read(folder).keys) == 10
            files.sweep(folder)
            assert hidden(folder) == []
            write(folder)
            assert snapshot(folder) == bytes_of


def test_a_table_that_was_whole_before_is_never_mixed_with_another(tmp_path):
    """Parts of former facts go before the first of the new ones comes, and no manifest vouches for others than its own."""

    def fresh() -> None:
        table(tmp_path)
        shutil.copy(tmp_path / "part-00000.parquet", tmp_path / "part-00001.parquet")

    for point in every_point(lambda: table(tmp_path, "2"), fresh):
        fresh()
        assert run_child(lambda: table(tmp_path, "2"), point)[0] == DEAD
        facts = {tables.read_metadata(path)["fact"] for path in tmp_path.glob("part-*.parquet")}
        if "2" in facts:
            assert facts == {"2"}
        for fact in ("1", "2"):
            if latents.is_current(tmp_path, {"fact": fact}):
                assert facts == {fact}


@pytest.mark.parametrize("torn", TORN)
def test_a_line_of_the_journal(tmp_path, torn):
    """Death at any byte of a line, or at the fsync of closing: complete lines stay, the torn one goes, nothing comes twice."""
    path = tmp_path / "rank-0.jsonl"
    line = b'{"event": "metrics", "time": 7, "step": 2, "values": {}}\n'
    for cut in range(0, len(line) + 1, 5):
        path.unlink(missing_ok=True)
        journal = Journal(path)
        journal.append("metrics", step=1, values={})
        journal.close()
        before = path.read_bytes()

        def die(cut: int = cut) -> None:
            os.write(os.open(path, os.O_WRONLY | os.O_APPEND), line[:cut])
            os.kill(os.getpid(), signal.SIGKILL)

        assert run_child(die, torn=torn)[0] == -signal.SIGKILL
        journal = Journal(path)
        journal.append("metrics", step=3, values={})
        journal.close()
        assert path.read_bytes().startswith(before)
        steps = [event["step"] for event, _ in read_events(path)]
        assert steps == ([1, 2, 3] if cut == len(line) else [1, 3])


# --- errors instead of death


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_step_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch, name, number):
    call_of, tried = getattr(os, name), 0
    failing = True
    while failing:
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        save_checkpoint(tmp_path / "checkpoint", checkpoint(4))
        calls = iter(range(10**6))

        def fail(*arguments: object, calls=calls, tried=tried) -> None:
            if next(calls) == tried:
                raise OSError(number, os.strerror(number))
            return call_of(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            try:
                save_checkpoint(tmp_path / "checkpoint", checkpoint(5))
            except (DiskError, OSError) as error:
                told = error
            else:
                told, failing = None, False
        if number == errno.ENOSPC and told:  # the one that a user can mend is one message
            assert str(told).startswith(f"cannot write {tmp_path}/checkpoint")
            assert "No space left on device" in str(told)
        assert hidden(tmp_path) == []
        found = load_checkpoint(tmp_path / "checkpoint", [])
        assert_is(found, found.progress["step"])
        tried += 1
    assert tried > (5 if name == "fsync" else 1)


# --- saving beside training


def test_training_may_go_on_while_the_copy_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the call, whatever training does to the tensors and the history afterwards."""
    import threading

    gate = threading.Event()
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda *arguments: (gate.wait(30), write(*arguments))[1])
    live = checkpoint(5)
    live.progress["history"] = [{"step": 1}]
    with Saver(tmp_path) as saver:
        saver.save(live)
        live.weights["w"].zero_()
        live.state["optimizers"][0]["m"].fill_(7)
        live.progress["history"].append({"step": 2})
        live.progress["step"] = 6
        assert not list(tmp_path.glob("step-*"))
        gate.set()
        saver.wait()
    found = load_checkpoint(tmp_path, [])
    assert found.progress.pop("history") == [{"step": 1}]
    assert_is(found, 5)


def test_a_save_that_failed_is_told_by_the_next_one_and_by_waiting(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Saver(tmp_path) as saver:
        saver.save(checkpoint(3))
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            saver.save(checkpoint(4))
            with pytest.raises(DiskError, match="step-0000000004: No space left on device"):
                saver.save(checkpoint(5))
            saver.save(checkpoint(6))
            with pytest.raises(DiskError, match="step-0000000006"):
                saver.wait()
        saver.wait()  # once told, it is told
        saver.save(checkpoint(7))
    assert_is(load_checkpoint(tmp_path, []), 7)
    assert hidden(tmp_path) == []


def test_a_damaged_newest_does_not_push_out_a_whole_one(tmp_path):
    for step in (3, 4):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-0000000004" / "state.pt").write_bytes(b"damaged")
    assert_is(load_checkpoint(tmp_path, []), 3)
    with Saver(tmp_path, resumed=3) as saver:
        saver.save(checkpoint(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003", "step-0000000005"]


# --- whole commands


@pytest.mark.parametrize("command", ["pretrain", "extract"])
def test_the_same_command_ends_with_the_same_bytes(recipe, finetuned, here, digits, command):
    die_and_go_on(recipe, finetuned, here, digits, command, lambda calls: [len(calls) // 2])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("torn", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_wherever_it_died(recipe, finetuned, here, digits, command, torn):
    die_and_go_on(recipe, finetuned, here, digits, command, lambda calls: range(len(calls)), torn)


def die_and_go_on(
    recipe: Callable,
    finetuned: Path,
    here: Path,
    digits: Path,
    command: str,
    points: Callable[[list[str]], Iterable[int]],
    torn: bool = True,
) -> None:
    recipe({"finetune.baselines": False})
    place(here, finetuned, digits, command)
    code, calls = run_child(lambda: call(*COMMANDS[command]))
    assert code == 0
    expected = results(here, command)
    assert expected
    deaths, tried = 0, list(points(calls))
    for point in tried:
        place(here, finetuned, digits, command)
        died, _ = run_child(lambda: call(*COMMANDS[command]), point, torn)
        assert died in (DEAD, 0)  # threads and what the first run left for the next may save a call or two
        deaths += died == DEAD
        left = results(here, command)
        assert left.items() <= expected.items(), f"half a file after {calls[: point + 1]}"
        answer = call(*COMMANDS[command], "--json")
        assert answer.json["status"] in ("done", "skipped")
        assert results(here, command) == expected, f"after {point} calls"
        assert hidden(here) == [], f"after {point} calls"
    assert deaths > 0.5 * len(tried)
