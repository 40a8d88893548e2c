"""How long a command takes to start: against the import of torch alone, and of what others import first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.kit import Bar, Missing, Row, Side, peer

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "pipelines" / "digits_demo.yaml"
MNIST = ROOT / "data" / "mnist"
FIRST_STEP = ("-m", "tests.benchmarks.first_step", "pretrain")
AT_ONCE = "import os, {0}; os._exit(0)"  # nobody pays for taking torch down again


def child(*words: str | Path, where: Path, code: int = 0, **more: str) -> Side:
    """A Python process from its start to its end, with `more` in its environment.

    Its code is kept compiled, as an installed program's is.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    environment |= more

    def work() -> None:
        found = subprocess.run([sys.executable, *map(str, words)], cwd=where, env=environment, capture_output=True, text=True)
        if found.returncode != code:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit code {found.returncode}\n{found.stderr}")

    return Side(work)


def imports(names: str, where: Path) -> Side:
    return child("-c", AT_ONCE.format(names), where=where)


def rows() -> Iterator[Row]:
    folder = tempfile.TemporaryDirectory()
    where = Path(folder.name)
    torch = imports("torch", where)
    yield Row(
        metric="start: pretrain until its first step is done (digits)",
        unit="s",
        sides={
            "ours": child(*FIRST_STEP, RECIPE, "--restart", where=where),  # packs the digits in the first, unmeasured call
            "limit": torch,
            **peer("pythae", lambda: imports("torch, pythae.models, pythae.trainers, pythae.pipelines", where)),
            **peer("lightning", lambda: imports("torch, lightning", where)),
        },
        bars=(Bar("limit", 1.3),),
        note="limit: import torch; peers: their imports alone",
    )
    mnist = child(*FIRST_STEP, ROOT / "pipelines/mnist_vae.yaml", "--restart", f"--set=data.path={MNIST}", where=where)
    yield Row(
        metric="start: pretrain until its first step is done (MNIST, resident)",
        unit="s",
        sides={"ours": mnist if MNIST.is_dir() else Missing(f"no packed MNIST at {MNIST.relative_to(ROOT)}"), "limit": torch},
        bars=(Bar("limit", 1.3),),
        note="limit: import torch",
    )
    misspelt = ("-m", "ssl_ae", "pretrain", RECIPE, "--set", "pretrain.epoch=3")
    for name, words, code in (
        ("--help", ("-m", "ssl_ae", "--help"), 0),
        ("recipe show, its data not there yet", ("-m", "ssl_ae", "recipe", "show", RECIPE, "--set=data.path=elsewhere"), 0),
        ("a misspelt option of a recipe", misspelt, 2),
    ):
        yield Row(
            metric=f"start: {name}",
            unit="s",
            sides={"ours": child(*words, where=where, code=code), "limit": child("-c", "pass", where=where), "torch": torch},
            bars=(Bar("torch", 0.5),),
            note="limit: python -c pass; torch: import torch",
        )
    folder.cleanup()
