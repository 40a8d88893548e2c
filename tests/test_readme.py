"""README tells the truth: its commands run, in order, and its tree is the tree."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = {"pretrain", "finetune", "run"}
ELSEWHERE = {"make", "pip"}  # `.ci/run` is `make demo` and `make test`; they install as pip does


def commands() -> list[str]:
    """Every command of the shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [" ".join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: the recipes, and four IDX files of MNIST's names and shape, small ones made from digits."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "pipelines", folder / "pipelines")
    digits = load_digits()
    images = np.kron(digits.images[:600] / 16 * 255, np.ones((1, 3, 3))).astype(np.uint8)  # 8 x 8 -> 24 x 24
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    idx = folder / "downloads" / "mnist"
    idx.mkdir(parents=True)
    for prefix, rows in (("train", slice(0, 500)), ("t10k", slice(500, 600))):
        x, y = images[rows], digits.target[:600][rows].astype(np.uint8)
        for name, header, body in (
            ("images-idx3", struct.pack(">IIII", 2051, len(x), 28, 28), x),
            ("labels-idx1", struct.pack(">II", 2049, len(y)), y),
        ):
            (idx / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + body.tobytes()))
    return folder


def test_every_command_runs_in_order(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One epoch each, journal only; `--labels 1000` is more than these 500 rows have, so it asks for 100."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SSL_AE_TRACKING", "journal")
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if words[0] in ELSEWHERE or words[:2] == ["ssl-ae", "ui"]:  # `ui` serves for ever: tests/tracking starts and stops it
            continue
        words = ["100" if word == "1000" else word for word in words]
        if TRAINING & set(words):
            words += ["--epochs", "1"]
        run(words, place)
        ran += 1
    assert ran >= 18
    assert (place / "predictions.parquet").exists()
    assert (place / "runs" / "mnist-vae" / "finetune" / "joint-alpha0.01" / "model.safetensors").exists()
    capsys.readouterr()


def run(words: list[str], place: Path) -> None:
    """In this process where that is the same thing: importing torch costs more than these commands do."""
    if words[0] == "ssl-ae" and "--nproc" not in words:
        from ssl_ae.cli import app

        app(words[1:], standalone_mode=False)
        return
    program = {"ssl-ae": [sys.executable, "-m", "ssl_ae"], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    done = subprocess.run([*program, *words[1:]], cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"


def test_the_tree_names_every_room_and_no_other() -> None:
    tree = README.split("ssl_ae/                  from the ground up")[1].split("plugins/\n")[0]
    named = set()
    for line in tree.splitlines():
        named |= {word.rstrip("/") for word in re.split(r"\s{3,}", line.strip())[0].split()}
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "ssl_ae").iterdir() if not p.name.startswith("__")}
    rooms = {room for room in rooms if room != "scaffold_modules"}  # the templates of `scaffold`
    assert named == rooms


def test_files_that_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", re.findall(r"`(make [a-z-]+)`", README))
def test_make_targets_exist(name: str) -> None:
    assert re.search(rf"^{name.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
