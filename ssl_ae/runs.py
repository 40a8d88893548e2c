"""Run folders: one writer at a time, a fingerprint a stage, and a field-by-field diff where a recipe has changed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
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

State = Literal["new", "resume", "done"]


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Be the only writer of a run folder. Raises CheckpointError that names the holder. The lock dies with its process.

    A folder that was made for the lock and got nothing else, because the stage refused its input, is removed again.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    files.make_folder(run)
    held = FileLock(run / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"the run folder {run} is in use by {_holder(run)}. Wait until it is done, or choose another folder with --out."
        ) from error
    try:
        files.write_json(run / HOLDER, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        (run / HOLDER).unlink(missing_ok=True)
        if made and [path.name for path in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
        held.release()
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


def _holder(run: Path) -> str:
    try:
        holder = files.read_json(run / HOLDER)
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


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

    def state(self, fields: dict[str, Any], restart: bool = False) -> State:
        """What `begin` would find. Raises CheckpointError with a diff when the folder was made from other inputs."""
        record = {} if restart else self.record()
        fields = files.plain(fields)
        if record and record["fields"] != fields:
            raise CheckpointError(
                f"{self.path} was made from another recipe:\n{diff(record['fields'], fields)}\n"
                "Start it over with --restart, or keep both with --out ANOTHER_FOLDER."
            )
        if record:
            return "done" if record["status"] == "done" else "resume"
        return "new"

    def begin(self, fields: dict[str, Any], restart: bool = False) -> State:
        """Claim the folder for these inputs; `restart` throws away what is there. Raises as `state` does."""
        state = self.state(fields, restart)
        if restart:
            shutil.rmtree(self.path, ignore_errors=True)
        if state == "new":
            files.make_folder(self.path)
            self._write(files.plain(fields), "unfinished")
        return state

    def finish(self, metrics: dict[str, float]) -> None:
        files.write_json(self.path / METRICS, metrics)
        self._write(self.record()["fields"], "done")

    def metrics(self) -> dict[str, float]:
        return files.read_json(self.path / METRICS)

    def mlflow_run_id(self) -> str | None:
        path = self.path / "mlflow_run_id"
        return path.read_text().strip() or None if path.exists() else None

    def _write(self, fields: dict[str, Any], status: str) -> None:
        files.write_json(self.path / STAGE, {"status": status, "fingerprint": files.digest(fields), "fields": fields})


def diff(old: Any, new: Any) -> str:
    """`  field: old -> new`, one line for each field that differs."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, _NOTHING) != after.get(key, _NOTHING):
            lines.append(f"  {key}: {before.get(key, 'nothing')} -> {after.get(key, 'nothing')}")
    return "\n".join(lines)


_NOTHING = object()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in items for key, value in _flat(item, f"{prefix}{name}.").items()}
