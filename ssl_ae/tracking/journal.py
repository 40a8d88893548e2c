"""What a run reports, on disk before it is anywhere else: JSON lines, one file a rank, only ever appended to.

The journal is the truth and MLflow a copy of it. A line that ends in a newline is complete; a torn last line (power
cut, full disk) is cut off when the journal is opened again. `cursor.json` beside the journals remembers, for each
store, which MLflow run they belong to and how many bytes of each were acknowledged; without it everything is delivered
again, which changes nothing in the store.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_ae import files
from ssl_ae.errors import DiskError, SslAeError

FOLDER = "journal"

Event = dict[str, Any]

FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # what an event of a kind cannot be delivered without
    "open": {"time": (int,), "identity": (str,), "experiment": (str,), "name": (str,)},
    "close": {"time": (int,), "status": (str,)},
    "metrics": {"time": (int,), "step": (int,), "values": (dict,)},
    "dataset": {"name": (str,), "digest": (str,), "source": (str,), "context": (str,), "rows": (int,)},
    "artifact": {"path": (str,), "folder": (str,)},
    "model": {"key": (str,), "code": (str,), "artifacts": (str,), "files": (list,), "x": (dict,), "requirements": (list,)},
}


def rank_file(stage_folder: Path, rank: int) -> Path:
    return stage_folder / FOLDER / f"rank-{rank}.jsonl"


def rank_files(stage_folder: Path) -> list[Path]:
    """Every rank's journal, rank 0 first."""
    return sorted((stage_folder / FOLDER).glob("rank-*.jsonl"), key=lambda path: (len(path.name), path.name))


def now() -> int:
    """Milliseconds since 1970, MLflow's unit of time."""
    return time.time_ns() // 1_000_000


class Journal:
    """Appends events to one file (about 10 us each). Safe to share between threads; one process a file."""

    def __init__(self, path: Path) -> None:
        files.make_folder(path.parent)
        self.path = path
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._cut_torn_line()
        except OSError as error:
            raise self._cannot_write(error) from error

    def append(self, kind: str, **fields: Any) -> None:
        """Write one event whole or not at all; a full disk is an SslAeError and leaves the earlier lines intact."""
        line = (json.dumps({"event": kind, "time": now(), **fields}, ensure_ascii=False) + "\n").encode()
        with self._lock:
            size = os.fstat(self._descriptor).st_size
            try:
                while line:  # a full disk takes a part first and says so only at the next write
                    line = line[os.write(self._descriptor, line) :]
            except OSError as error:
                os.ftruncate(self._descriptor, size)
                raise self._cannot_write(error) from error

    def close(self) -> None:
        with self._lock:
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    def _cut_torn_line(self) -> None:
        size = end = os.fstat(self._descriptor).st_size
        complete = 0
        while end > 0 and not complete:
            start = max(0, end - 65_536)
            complete = start + os.pread(self._descriptor, end - start, start).rfind(b"\n") + 1
            if complete == start:  # no newline in this piece
                complete, end = 0, start
        if complete < size:
            os.ftruncate(self._descriptor, complete)

    def _cannot_write(self, error: OSError) -> SslAeError:
        kind = DiskError if error.errno in files.FULL else SslAeError
        return kind(
            f"cannot write the journal {self.path}: {error.strerror}. Free some space or mend its permissions, "
            "then run the same command to go on."
        )


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event | None, int]]:
    """Yield (event, byte offset after it) for every complete line from `offset`; None stands for an unreadable line."""
    with open(path, "rb") as file:
        file.seek(max(0, offset - 1))
        if offset and file.read(1) != b"\n":  # it belongs to a journal that was replaced since, or to a damaged cursor
            offset = 0
            file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _parse(line), offset


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        readable = all(type(event[name]) in kinds for name, kinds in FIELDS.get(event["event"], {}).items())
        if event["event"] == "metrics":
            all(map(float, event["values"].values()))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return event if readable else None


def opened(path: Path) -> Event | None:
    """The first `open` event of rank 0's journal, which holds the run's identity for good; None before there is one."""
    return next((event for event, _ in read_events(path) if event and event["event"] == "open"), None)


def last_turn(path: Path) -> Event | None:
    """The last `open` or `close` event of rank 0's journal: whether it says it runs, and who runs it."""
    turn = None
    for event, _ in read_events(path):
        if event and event["event"] in ("open", "close"):
            turn = event
    return turn


def as_json_number(value: float) -> float | str:
    """A float as JSON can hold it: nan and the infinities as text, which `float` reads back."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Cursor:
    """`journal/cursor.json`: for each store, the MLflow run and the bytes of each journal that it acknowledged."""

    def __init__(self, stage_folder: Path, store: str) -> None:
        self._path = stage_folder / FOLDER / "cursor.json"
        self._store = store
        self.run_id: str | None = None
        self.offsets: dict[str, int] = {}
        match self._stores().get(store):
            case {"run_id": str(run_id), "offsets": dict(offsets)} if all(type(end) is int for end in offsets.values()):
                self.run_id, self.offsets = run_id, offsets

    def save(self) -> None:
        stores = self._stores() | {self._store: {"run_id": self.run_id, "offsets": self.offsets}}
        files.write_json(self._path, stores)

    def _stores(self) -> dict[str, Any]:
        try:
            stores = files.read_json(self._path)
        except (OSError, ValueError):  # absent or damaged: everything is delivered again, which changes nothing
            return {}
        return stores if isinstance(stores, dict) else {}
