"""How files reach the disk: whole or not at all, and known by their sha256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_ae.errors import SslAeError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to be filled; it is gone in the end unless `move_folder` moved it."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_folder(aside: Path, path: Path) -> None:
    """Give a folder from `folder_aside` its name; a folder that has it already makes way and is removed."""
    if not path.exists() or not any(path.iterdir()):
        os.replace(aside, path)
    else:
        old = aside.with_suffix(".old")
        os.replace(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    _sync_folder(path.parent)


def make_folder(path: Path) -> Path:
    """Create `path` and its parents; a folder that cannot be written is the user's to mend, so it is an SslAeError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SslAeError(f"cannot create the folder {path}: {error.strerror}. Choose another place for it.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SslAeError(f"the folder {path} is not writable. Change its permissions or choose another place.")
    return path


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
