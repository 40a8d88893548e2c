"""Processes that die at a chosen moment of writing, and what must be true of a folder afterwards."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEAD = 77  # exit code of a child that died where it was told to
LONGEST_SECONDS = 120
CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir")  # between any two of them a kill finds another state of the disk


def run_child(work: Callable[[], object], die_at: int | None = None, torn: bool = False) -> tuple[int, list[str]]:
    """Run `work` in a forked child that ends, as by SIGKILL, just before its call number `die_at` (from 0) of `CALLS`.

    `torn`: what the call was to fsync loses its second half before, as in a power cut. Returns the exit code and the calls.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            os.setsid()
            torch.set_num_threads(1)  # no pool of threads survives a fork
            _count_calls(write, die_at, torn)
            work()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    watch = threading.Timer(LONGEST_SECONDS, os.kill, (pid, signal.SIGKILL))
    watch.start()
    with open(read) as pipe:
        calls = pipe.read().split()
    _, status = os.waitpid(pid, 0)
    watch.cancel()
    return os.waitstatus_to_exitcode(status), calls


def _count_calls(report: int, die_at: int | None, torn: bool) -> None:
    seen, lock = [], threading.Lock()

    def counted(name: str, call: Callable) -> Callable:
        def counting(*arguments: object, **options: object) -> object:
            with lock:  # a second thread stands still while the process dies
                if len(seen) == die_at:
                    if torn and name == "fsync":
                        with contextlib.suppress(OSError):  # a folder
                            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                    os._exit(DEAD)
                seen.append(name)
                os.write(report, f"{name} ".encode())
            return call(*arguments, **options)

        return counting

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def hidden(folder: Path) -> list[str]:
    """What an unfinished write left below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")]


def flip_a_bit(path: Path, place: float = 0.5, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
