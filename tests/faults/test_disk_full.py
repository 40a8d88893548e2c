"""A disk that takes no more, for every writer: what was complete stays, one clear message, and with space the same bytes."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Answer, call
from faults.store_kit import COMMANDS, answer_of_child, hidden, place, results

MESSAGE = "error: cannot write "
LIMITS = [2**k for k in range(7, 24)]  # bytes a file may have: 128 and twice as many until everything fits


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ, so this is EFBIG


def assert_clear(answer: Answer, reason: str) -> None:
    assert answer.code == 1, answer
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    (message,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith(MESSAGE)
    assert reason in message
    assert message.endswith("un the same command to go on.")


def others(folder: Path, command: str) -> dict[str, bytes]:
    """The files that the command does not make."""
    own = {"pack": "packed", "predict": "runs/tiny/predictions"}.get(command, f"runs/tiny/{command}")
    mine = (own, "runs/tiny/latents", "runs/tiny/.lock", "runs/tiny/recipe.yaml", "runs/tiny/card.json", "filler")
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in there.items() if not name.startswith(mine)}


def assert_intact(before: dict[str, bytes], folder: Path) -> None:
    for name, content in before.items():
        now = (folder / name).read_bytes()
        assert now.startswith(content) if name.endswith(".jsonl") else now == content, name


@pytest.mark.parametrize("command", ["extract", *(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS if c != "extract")])
def test_a_limit_on_the_size_of_files(recipe, finetuned, here, digits, command):
    """Grown step by step, the limit meets one writer of the command after another."""
    recipe({"finetune.baselines": False})
    place(here, finetuned, digits, command)
    shutil.copytree(finetuned, here / "start" / "tiny")
    before = others(here, command)
    assert call(*COMMANDS[command]).code == 0
    expected = results(here, command)
    shutil.rmtree(finetuned)
    shutil.copytree(here / "start" / "tiny", finetuned)
    place(here, finetuned, digits, command)
    refusals = set()
    for size in LIMITS:
        answer = answer_of_child(lambda size=size: limit(size), *COMMANDS[command], "--json")
        if answer.code == 0:
            break
        assert_clear(answer, "File too large")
        refusals.add(answer.stderr.partition(MESSAGE)[2].partition(":")[0])
        assert results(here, command).items() <= expected.items()
        assert hidden(here) == []
        assert_intact(before, here)
    assert answer.json["status"] == "done"
    assert len(refusals) >= {"pack": 1, "predict": 1}.get(command, 3)
    assert results(here, command) == expected
    assert hidden(here) == []


# --- a disk of 2 MiB that is really full


@pytest.fixture
def small_disk(tmp_path):
    """An empty tmpfs of 2 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = sys.platform == "linux" and subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Take all but `left` bytes of what is free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    status = os.statvfs(disk)
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - left)))
    return filler


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(recipe, finetuned, here, digits, small_disk, monkeypatch, command):
    recipe({"finetune.baselines": False})
    place(here, finetuned, digits, command)
    for name in ("recipe.yaml", "table", "runs"):
        (shutil.copytree if (here / name).is_dir() else shutil.copy)(here / name, small_disk / name)
    assert call(*COMMANDS[command]).code == 0
    expected = results(here, command)
    monkeypatch.chdir(small_disk)
    before, refusals = others(small_disk, command), 0
    for left in (0, 4096, 8192, 16384, 32768, 65536, 131072):
        filler = fill(small_disk, left)
        answer = answer_of_child(lambda: None, *COMMANDS[command], "--json")
        if answer.code == 0:
            break
        refusals += 1
        assert_clear(answer, "No space left on device")
        assert results(small_disk, command).items() <= expected.items()
        assert hidden(small_disk) == []
        assert_intact(before, small_disk)
    filler.unlink()
    assert refusals
    assert answer_of_child(lambda: None, *COMMANDS[command], "--json").code == 0
    assert results(small_disk, command) == expected
    assert hidden(small_disk) == []
