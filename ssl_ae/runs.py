"""Run folders: one writer at a time, a fingerprint a stage, and a field-by-field diff where a recipe has changed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ssl_ae import files
from ssl_ae.errors import CheckpointError

RECIPE = "recipe.yaml"
MODEL = "model.safetensors"
STAGE = "stage.json"
METRICS = "metrics.json"
CARD = "card.json"
LOCK = ".lock"
HOLDER = ".lock-holder.json"
PLACES = (
    ".",
    "pretrain",
    "finetune",
    "latents",
    "layers",
    "baselines",
    "evaluate",
    "controls",
    "cells",
)  # what stages write into; "." not deeper
BEAT_SECONDS, SILENT_SECONDS = 10.0, 35.0

State = Literal["new", "resume", "done"]
Tree = dict[str, Any]
Changes = dict[str, tuple[Any, Any]]
Allow = Callable[[str, Any, Any, bool], bool]  # name, before, after, whether the stage is done: may this change pass?


@dataclass(frozen=True)
class Inputs:
    """What decides a stage's result, and what may differ from what an earlier command said."""

    fields: Tree
    software: dict[str, str] | None = None  # versions, which an unfinished stage must find as they were
    allow: Allow | None = None  # where the user asked for it


@contextlib.contextmanager
def lock(run: Path, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
    """Be the only writer of a run folder. Raises CheckpointError that names the holder.

    The lock is the kernel's and dies with its process. Where a file system keeps it from other machines, the record of the
    holder decides, which a living one touches every `BEAT_SECONDS`: assumed is only that other machines see that within
    `SILENT_SECONDS`. A lock that somebody left is taken over, which `say` is told. A folder that was made for the lock and
    got nothing else, because the stage refused its input, is removed again.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    files.make_folder(run)
    held = FileLock(run / LOCK, timeout=0)
    try:
        with files.when_full(run / LOCK):
            held.acquire()
    except Timeout as error:
        raise _in_use(run, Holder.of(run)) from error
    ours = None
    try:
        _take_over(run, say)
        for place in PLACES:
            files.sweep(run / place, deep=place != ".")
        ours = Holder.here()
        with ours.beating(run):
            yield
    finally:
        if ours is not None:
            (run / HOLDER).unlink(missing_ok=True)
        if made and [path.name for path in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
        held.release()
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


@dataclass(frozen=True)
class Holder:
    """Who writes a run folder: a process, its machine, and since when that machine runs."""

    pid: int
    host: str
    boot: str

    @classmethod
    def here(cls) -> Holder:
        return cls(os.getpid(), socket.gethostname(), boot_id())

    @classmethod
    def of(cls, run: Path) -> Holder | None:
        """As recorded; None where there is no record, or it is torn."""
        try:
            found = files.read_json(run / HOLDER)
            return cls(found["pid"], found["host"], found.get("boot", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @contextlib.contextmanager
    def beating(self, run: Path) -> Iterator[None]:
        """Keep the record while the block runs, and touch it so that other machines see that its process lives."""
        files.write_json(run / HOLDER, vars(self))
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError):
                    os.utime(run / HOLDER)

        threading.Thread(target=beat, name="run-lock", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def beats(self, run: Path) -> bool:
        """Whether the record is touched while we look, which takes `SILENT_SECONDS` where it is not."""
        first, end = _touched(run), time.monotonic() + SILENT_SECONDS
        while _touched(run) == first and time.monotonic() < end:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
        return _touched(run) not in (first, None)


def boot_id() -> str:
    """Another after every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        import psutil

        return f"{psutil.boot_time():.0f}"


def _take_over(run: Path, say: Callable[[str], None]) -> None:
    """The kernel gave us the lock: judge the record that another left. Raises CheckpointError where that one lives."""
    left, here = Holder.of(run), Holder.here()
    if left is None:
        (run / HOLDER).unlink(missing_ok=True)
        return
    if left.host != here.host and left.boot != here.boot:  # the kernel speaks for its own machine alone
        say(f"{run} was left by {left}, which cannot be asked from here: watching for {SILENT_SECONDS:g} s whether it lives")
        if left.beats(run):
            raise _in_use(run, left)
    say(f"{run} was left by {left}, which is gone: going on in its place")


def _touched(run: Path) -> int | None:
    try:
        with open(run / HOLDER) as file:  # network file systems ask their server when a file is opened, not for its name
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _in_use(run: Path, holder: Holder | None) -> CheckpointError:
    return CheckpointError(
        f"the run folder {run} is in use by {holder or 'another process'}. "
        "Wait until it is done, or choose another folder with --out."
    )


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run: `stage.json` says from what it was made and whether it is done."""

    path: Path

    @property
    def done(self) -> bool:
        return self.record().get("status") == "done"

    @property
    def fingerprint(self) -> str:
        return self.record().get("fingerprint", "")

    def record(self) -> dict[str, Any]:
        try:
            return files.read_json(self.path / STAGE)
        except FileNotFoundError:
            return {}
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.path / STAGE} cannot be read: {error}. Start the stage over with --restart.") from error

    def state(self, inputs: Inputs, restart: bool = False) -> State:
        """What `begin` would find. Raises CheckpointError with a diff when the folder was made from other inputs."""
        record = {} if restart else self.record()
        if not record:
            return "new"
        if refused := self.refused(inputs):
            carried = f"--force does not carry {', '.join(refused)}: the result depends on it. " if inputs.allow else ""
            raise CheckpointError(
                f"{self.path} was made from another recipe:\n{shown(self.changes(inputs))}\n"
                f"{carried}Start it over with --restart, or keep both with --out ANOTHER_FOLDER."
            )
        return "done" if record["status"] == "done" else "resume"

    def changes(self, inputs: Inputs) -> Changes:
        """What differs from the record of this stage. Software matters as long as the stage is not finished."""
        record = self.record()
        if not record:
            return {}
        found = differences(record["fields"], files.plain(inputs.fields))
        if record["status"] != "done" and inputs.software is not None and record.get("software"):
            found |= differences({"software": record["software"]}, {"software": inputs.software})
        return found

    def refused(self, inputs: Inputs) -> list[str]:
        """The names of the changes that may not pass."""
        done, allow = self.done, inputs.allow
        return [name for name, (old, new) in self.changes(inputs).items() if allow is None or not allow(name, old, new, done)]

    def begin(self, inputs: Inputs, restart: bool = False) -> State:
        """Claim the folder for these inputs; `restart` throws away what is there. Raises as `state` does."""
        state, changes = self.state(inputs, restart), {} if restart else self.changes(inputs)
        if restart:
            files.remove_folder(self.path)
        if state == "new":
            files.make_folder(self.path)
            self._write({"software": inputs.software}, inputs.fields, "unfinished")
        elif state == "resume" and changes:
            record = self.record()
            forced = [*record.get("forced", []), {name: list(pair) for name, pair in changes.items()}]
            self._write(record | {"software": inputs.software, "forced": forced}, inputs.fields, "unfinished")
        return state

    def finish(self, metrics: dict[str, float]) -> None:
        files.write_json(self.path / METRICS, metrics)
        record, weights = self.record(), self.path / MODEL
        sums = {MODEL: files.sha256_of(weights)} if weights.exists() else {}
        self._write(record | {"sha256": sums}, record["fields"], "done")

    def weights(self) -> Path:
        """The finished weights. Raises CheckpointError where their bytes are not those that were finished."""
        path = self.path / MODEL
        expected = self.record().get("sha256", {}).get(MODEL)
        try:
            found = sha256_of(path) if expected else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is not that in {STAGE}. Put a copy back, or start the stage over with --restart."
            )
        return path

    def metrics(self) -> dict[str, float]:
        return files.read_json(self.path / METRICS)

    def mlflow_run_id(self) -> str | None:
        path = self.path / "mlflow_run_id"
        return path.read_text().strip() or None if path.exists() else None

    def _write(self, record: Tree, fields: Tree, status: str) -> None:
        fields = files.plain(fields)
        main = {"status": status, "fingerprint": files.digest(fields), "fields": fields}
        files.write_json(self.path / STAGE, main | {name: value for name, value in record.items() if name not in main})


def is_stage(folder: Path) -> bool:
    """Whether a folder is a stage's: RUN/finetune/METHOD can be named for RUN where its encoder is meant."""
    return (folder / STAGE).exists()


def holder_of(folder: Path) -> Path:
    """The run folder that a finetuning RUN/finetune/METHOD is in; a run folder itself."""
    return folder.parent.parent if is_stage(folder) else folder


def sha256_of(path: Path) -> str:
    """Read once as long as the file stays the same."""
    status = path.stat()
    return _sha256_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, *stamp: int) -> str:
    return files.sha256_of(path)


def diff(old: Any, new: Any) -> str:
    """`  field: old -> new`, one line for each field that differs."""
    return shown(differences(old, new))


def shown(changes: Changes) -> str:
    return "\n".join(f"  {name}: {old} -> {new}" for name, (old, new) in changes.items())


def differences(old: Any, new: Any) -> Changes:
    """{field: (old, new)} of two trees, fields named as `--set` names them; "nothing" where one has none."""
    before, after = _flat(old), _flat(new)
    return {
        name: (before.get(name, "nothing"), after.get(name, "nothing"))
        for name in dict.fromkeys([*before, *after])
        if before.get(name, _NOTHING) != after.get(name, _NOTHING)
    }


_NOTHING = object()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in items for key, value in _flat(item, f"{prefix}{name}.").items()}
