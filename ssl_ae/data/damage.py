"""Damage in a data set: what may be left out, what was, and which files were read to their end and found whole."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssl_ae import files
from ssl_ae.errors import DataError, SslAeError

SETTLED_NS = 2 * 10**9  # a file changed later than this before it was read may change again without a new time
TOLD = 3  # reasons in a message


class Damage(DataError):
    """A shard that is not what the card says, as distinct from one that cannot be reached."""


@dataclass(frozen=True)
class Tolerance:
    """`skip` leaves damage out, up to `limit`, the share of a split's samples; without it damage is an error."""

    skip: bool = False
    limit: float = 0.01


FAIL = Tolerance()


class Loss(NamedTuple):
    """Samples of one file that were left out."""

    split: str
    rows: int  # those of a shard that cannot even be counted: as many as others have, or as its bytes hold in them
    reason: str


def tell(losses: Sequence[Loss], kept: dict[str, int], place: str, limit: float) -> list[str]:
    """One line for each split that lost samples; kept: {split: rows that are left}.

    Raises DataError where a split lost more than `limit` of its samples, or all.
    """
    lines = []
    for split in dict.fromkeys(loss.split for loss in losses):
        here = [loss for loss in losses if loss.split == split]
        lost, left = sum(loss.rows for loss in here), kept.get(split, 0)
        reasons = " ".join(loss.reason for loss in here[:TOLD])
        more = f" (and {len(here) - TOLD:,} more)" if len(here) > TOLD else ""
        count, allowed = f"{lost:,} of {lost + left:,} samples of {split}", int(limit * (lost + left))
        if not left or lost > allowed:
            raise DataError(
                f"{place}: {count} are damaged; data.damaged_limit = {limit:g} lets {allowed:,} be left out. {reasons}{more}"
            )
        lines.append(f"{place}: left out {count} (data.damaged: skip). {reasons}{more}")
    return lines


class Memory:
    """What is known of the files of a folder since they were last read whole, as long as they stay what they were.

    It lies in the cache of this machine, because data may be read-only, and is only ever a shortcut: where it cannot be
    read or written, the files are read again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = files.cache_folder() / "checked" / f"{files.digest(str(folder.resolve()))[:32]}.json"
        self._known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            found = files.read_json(self._path)
            self._known = {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}
        self._new = False

    def of(self, path: Path) -> dict[str, Any]:
        """What was kept of a file; nothing where it has changed since."""
        known = self._known.get(path.name, {})
        return known if known.get("stamp") == list(stamp_of(path)) else {}

    def keep(self, path: Path, stamp: Sequence[int], **what: Any) -> None:
        """Remember of a file what was found in it while it had this stamp."""
        what = json.loads(json.dumps(what))
        if time.time_ns() - stamp[2] > SETTLED_NS:
            self._known[path.name] = {**self.of(path), "stamp": list(stamp), **what}
            self._new = True

    def save(self) -> None:
        if self._new:
            with contextlib.suppress(OSError, SslAeError):
                files.write_json(self._path, self._known)


def hashes(paths: Iterable[Path], memory: Memory | None) -> dict[Path, str | DataError]:
    """sha256 of each file, or why it cannot be read; those that `memory` knows are not read again."""

    def find(path: Path) -> str | DataError:
        try:
            known = memory.of(path).get("sha256") if memory else None
            if isinstance(known, str):
                return known
            stamp, found = stamp_of(path), files.sha256_of(path)
        except OSError as error:
            return DataError(f"{path}: {error.strerror}. Pack the source again, or restore the file.")
        if memory:
            memory.keep(path, stamp, sha256=found)
        return found

    paths = [*paths]
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(find, paths), strict=True))


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What tells a file from another that later takes its name, and from itself once it is changed: inode, bytes, time (ns)."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
