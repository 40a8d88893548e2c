"""Commands on several ranks that are disturbed while they run, and what they leave behind."""

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from command_line import start

SECONDS = 120  # a command that hangs is a failure, not a wait


def wait_for(what: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "it never came"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def checkpoints(run: Path) -> list[Path]:
    return list(run.glob("pretrain/checkpoint/step-*"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(run: Path) -> str:
    return sha256(run / "pretrain" / "model.safetensors")


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """{rank: process} of the ranks that a launcher has started."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            rank = child.environ().get("RANK")
            if rank is not None and "ssl_ae" in child.cmdline():
                found[int(rank)] = child
    return found


class Running:
    """A command on ranks under way."""

    def __init__(self, process: subprocess.Popen, ranks: dict[int, psutil.Process]) -> None:
        self.process, self.ranks = process, ranks

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """To one rank, or to the launcher."""
        os.kill(self.process.pid if rank is None else self.ranks[rank].pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr. Raises AssertionError when a rank of the beginning outlives its launcher."""
        _, stderr = self.process.communicate(timeout=SECONDS)
        assert not [rank for rank in self.ranks.values() if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE], stderr
        return self.process.returncode, stderr


@contextlib.contextmanager
def running(*words: object, after: Callable[[], object], ranks: int = 2, **more: object) -> Iterator[Running]:
    """`ssl-ae WORDS` on so many ranks, once `after` holds. Whatever the test does, nothing is left running."""
    with start(*words, **more) as process:
        found: dict[int, psutil.Process] = {}
        try:
            wait_for(after, process)
            found = ranks_of(process)
            assert len(found) == ranks, found
            yield Running(process, found)
        finally:
            for each in (*found.values(), process):
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    each.kill()
