"""Processes that die at a chosen moment of writing, and what must be true of a folder afterwards."""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from command_line import Answer, call

from ssl_ae import files

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


def answer_of_child(prepare: Callable[[], object], *words: object) -> Answer:
    """What a command answers in a forked child, after `prepare` made life hard for it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            prepare()
            answer = call(*words)
            os.write(write, json.dumps([answer.code, answer.stdout[-9000:], answer.stderr[-9000:]]).encode())
        except BaseException as error:
            os.write(write, json.dumps([-1, "", f"Traceback: {error!r}"]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = Answer(*json.loads(pipe.read()))
    os.waitpid(pid, 0)
    return answer


COMMANDS = {
    "pack": ("data", "pack", "digits", "packed"),
    "pretrain": ("pretrain", "recipe.yaml", "--epochs", "2"),
    "extract": ("extract", "runs/tiny"),
    "finetune": ("finetune", "recipe.yaml", "--joint", "--out", "runs/tiny"),
    "predict": ("predict", "runs/tiny", "table", "--out", "runs/tiny/predictions.parquet"),
}
RESULTS = {
    "pack": ["packed/*.tar", "packed/card.json", "packed/labels.parquet"],
    "pretrain": ["runs/tiny/pretrain/model.safetensors"],
    "extract": ["runs/tiny/latents/*/*.parquet", "runs/tiny/latents/*/_manifest.json"],
    "finetune": ["runs/tiny/finetune/*/model.safetensors"],
    "predict": ["runs/tiny/predictions.parquet"],
}


def results(folder: Path, command: str) -> dict[str, str]:
    found = [path for pattern in RESULTS[command] for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): files.sha256_of(path) for path in found}


def place(here: Path, finetuned: Path, digits: Path, command: str) -> None:
    """What the command starts from: everything that it makes is gone."""
    shutil.copytree(digits, here / "table", dirs_exist_ok=True)
    gone = {"pretrain": ["pretrain", "latents", "finetune"], "extract": ["latents"], "finetune": ["finetune", "baselines"]}
    for name in gone.get(command, []):
        shutil.rmtree(finetuned / name, ignore_errors=True)
    (finetuned / "predictions.parquet").unlink(missing_ok=True)
    shutil.rmtree(here / "packed", ignore_errors=True)
