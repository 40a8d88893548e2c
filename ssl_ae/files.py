"""How files reach the disk: whole or not at all, and known by their sha256."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssl_ae.errors import DiskError, RecipeError, SslAeError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ASIDE, FORMER = "tmp", "old"  # how names end: of what is not complete yet, and of what made way for another
_HIDDEN = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{8}}\.(?P<kind>{ASIDE}|{FORMER})")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it.

    Raises DiskError where the disk is full, SslAeError where a folder has the name; what had it before is as it was.
    """
    if path.is_dir():
        raise SslAeError(f"cannot write {path}: it is a folder. Name a file.")
    make_folder(path.parent)
    with when_full(path), _new_beside(path, Path.touch) as aside:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)


def check_name(option: str, path: Path, suffix: str, what: str) -> None:
    """Raises RecipeError for a file that is asked for under a name of another kind, or of a folder: before it is computed."""
    if path.suffix != suffix:
        raise RecipeError(f"{option} {path}: {what}; give a name that ends in {suffix}.")
    if path.is_dir():
        raise RecipeError(f"{option} {path} is a folder. Name a file that is not there yet, or one to be replaced.")


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to be filled; it is gone in the end unless `move_folder` moved it.

    What killed processes left beside `path` is cleared away first. Raises DiskError where the disk is full.
    """
    make_folder(path.parent)
    sweep(path.parent, path.name)
    with when_full(path), _new_beside(path, Path.mkdir) as aside:
        yield aside


def move_folder(aside: Path, path: Path) -> None:
    """Give a folder from `folder_aside` its name; a folder that has it already makes way and is removed."""
    sync_folder(aside)
    if not path.exists() or not any(path.iterdir()):
        os.replace(aside, path)
    else:
        former = _beside(path, FORMER)
        with _in_hand(path):  # `sweep` gives the name back only where nobody is at work here
            os.replace(path, former)
            try:
                os.replace(aside, path)
            except OSError:
                os.replace(former, path)
                raise
            shutil.rmtree(former)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder where it exists: under its name it is whole or gone, whenever the process is killed."""
    former = _beside(path, ASIDE)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, former)
        sync_folder(path.parent)
        shutil.rmtree(former, ignore_errors=True)


def sweep(folder: Path, target: str | None = None, deep: bool = False) -> None:
    """Clear away what killed processes left in `folder`: beside one `target`, or beside all.

    A folder that had made way for another that never came gets its name back. What a living process has in hand is locked
    by it and stays; on file systems without locks everything stays.
    """
    try:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(folder)]
    except OSError:
        return
    for name, is_folder in entries:
        hidden = _HIDDEN.fullmatch(name)
        if hidden and target in (None, hidden["target"]):
            _clear(folder / name, folder / hidden["target"] if hidden["kind"] == FORMER else None)
        elif deep and is_folder:
            sweep(folder / name, target, deep)


def make_folder(path: Path) -> Path:
    """Create `path` and its parents; a folder that cannot be written is the user's to mend, so it is an SslAeError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with when_full(path):
            path.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)
    except OSError as error:
        raise SslAeError(f"cannot create the folder {path}: {error.strerror}. Choose another place for it.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SslAeError(f"the folder {path} is not writable. Change its permissions or choose another place.")
    return path


def sync_folder(folder: Path) -> None:
    """fsync a folder, because a rename in it must survive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def when_full(path: Path) -> Iterator[None]:
    """Where a full disk becomes a message, whoever wrote: DiskError names `path`."""
    try:
        yield
    except (OSError, DiskError) as error:
        full = error.__cause__ if isinstance(error, DiskError) else error  # of a part of `path` that has no name of its own
        if not isinstance(full, OSError) or full.errno not in FULL:
            raise
        raise DiskError(
            f"cannot write {path}: {os.strerror(full.errno)}. What was complete before is as it was. "
            "Free some space, then run the same command to go on."
        ) from full


def cache_folder() -> Path:
    """What can be made again from elsewhere: `SSL_AE_CACHE`, else `ssl-ae` among the user's caches. It need not exist."""
    if given := os.environ.get("SSL_AE_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl-ae"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"ssl-ae-{os.getuid()}"


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def without_nan(value: Any) -> Any:
    """The same tree with null where a float is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """The tree as it comes back from a JSON file: tuples as lists, null for NaN."""
    return json.loads(json.dumps(without_nan(value), default=str))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON tree, independent of key order: the fingerprint of a stage's inputs."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextlib.contextmanager
def _new_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `path`, locked; gone in the end unless it was renamed."""
    with contextlib.ExitStack() as stack:
        ours = False
        while not ours:  # another process may sweep between the two lines
            make(aside := _beside(path, ASIDE))
            ours = stack.enter_context(_in_hand(aside))
        try:
            yield aside
        finally:
            _remove(aside)


@contextlib.contextmanager
def _in_hand(path: Path) -> Iterator[bool]:
    """Lock a file or folder for the block, so that `sweep` leaves it; False where another process is clearing it away."""
    descriptor, ours = None, True
    try:
        descriptor = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        pass  # a file system without locks: `sweep` finds none either
    try:
        yield ours
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path) -> int:
    """A descriptor that locks `path` until it is closed or its process ends. Raises OSError where there is no lock to be had."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "another has this name by now", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clear(left: Path, owner: Path | None) -> None:
    """Remove what nobody has in hand; give it to `owner`, whose it was, where that is gone."""
    try:
        descriptor = _lock(left)
    except OSError:
        return
    try:
        if owner is not None and not owner.exists():
            os.replace(left, owner)
        else:
            _remove(left)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
