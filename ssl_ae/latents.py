"""The latents table: one row a sample, in Parquet, under a contract that others read.

`latents/SPLIT/part-NNNNN.parquet`: key string, label int64? (or list<float> of targets), latent fixed_size_list<float>[K],
latent_std the same where the posterior is random, reconstruction_nats float with `--scores`. Metadata: schema version, recipe
fingerprint, sha256 of the weights. `_manifest.json` is last: a table without it is not finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ae import files, tables
from ssl_ae.errors import DataError
from ssl_ae.trace import UNLABELED

SCHEMA_VERSION = "1"
PART_ROWS = 16_384  # small enough that several ranks share a middling data set, at most 64k as promised
MANIFEST = "_manifest.json"


@dataclass(frozen=True)
class Latents:
    """A finished table in memory, in the split's order."""

    keys: np.ndarray  # (N,) text
    labels: np.ndarray  # (N,) int64 with -1, or (N, T) float32 with NaN
    z: np.ndarray  # (N, K) float32
    metadata: dict[str, str]


def part_of(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def parts_of(rows: int) -> list[range]:
    """Row ranges of the parts of a table: a function of the number of rows alone, so ranks may come and go."""
    return [range(start, min(start + PART_ROWS, rows)) for start in range(0, rows, PART_ROWS)]


def write_part(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """`columns` in the contract's names; labels with -1 become nulls."""
    ready = dict(columns)
    if ready["label"].ndim == 1:
        ready["label"] = np.ma.masked_array(ready["label"], mask=ready["label"] == UNLABELED)
    tables.write_parquet(path, ready, _with_version(metadata))


def begin(folder: Path, metadata: Mapping[str, str]) -> None:
    """Leave of a table what belongs to this one: the parts with these facts, from where it goes on, and no manifest."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("part-*.parquet"):
        if not _is_of(path, metadata):
            path.unlink()


def written(folder: Path, index: int, keys: np.ndarray, metadata: Mapping[str, str]) -> tables.Table | None:
    """A part that is there already, whole and of these rows; None where it has to be made.

    Raises DataError where it is damaged.
    """
    path = part_of(folder, index)
    if not path.exists():
        return None
    part = tables.read_parquet(path)
    same = part.metadata == _with_version(metadata) and len(keys) == part.rows and (part["key"] == keys.astype(object)).all()
    return part if same else None


def finish(folder: Path, rows: int, metadata: Mapping[str, str], task: str | None) -> None:
    """Write the manifest, which makes the table complete, and remove parts that are not of this table."""
    names = [part_of(folder, i).name for i in range(len(parts_of(rows)))]
    for stranger in set(folder.glob("part-*.parquet")) - {folder / name for name in names}:
        stranger.unlink()
    footers = [tables.footer_sha256(folder / name) for name in names]
    files.write_json(
        folder / MANIFEST,
        {"rows": rows, "parts": names, "footers_sha256": footers, "task": task, "metadata": dict(metadata)},
    )


def is_current(folder: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the folder holds a finished table made by these weights from this data."""
    try:
        return _manifest(folder)["metadata"] == dict(metadata)
    except DataError:  # absent or damaged: what parts there are say themselves what they are
        return False


def finished_parts(folder: Path) -> list[Path]:
    """The parts of a finished table, in the split's order. Raises DataError where it is unfinished or damaged."""
    return [folder / name for name in _manifest(folder)["parts"]]


def task_of(folder: Path) -> str | None:
    """classes, regression or multilabel; None where the table has no labels. Raises DataError as `finished_parts` does."""
    return _manifest(folder).get("task")


def read(folder: Path) -> Latents:
    """Raises DataError for a table that is absent, unfinished or damaged."""
    manifest = _manifest(folder)
    footers = dict(zip(manifest["parts"], manifest.get("footers_sha256", []), strict=False))
    parts = [_read_part(folder / name, footers.get(name)) for name in manifest["parts"]]
    rows = sum(part.rows for part in parts)
    if rows != manifest["rows"]:
        raise DataError(f"{folder}: {rows} rows, but its manifest says {manifest['rows']}. Remove that and extract again.")
    labels = np.concatenate([filled(part["label"]) for part in parts])
    return Latents(
        keys=np.concatenate([part["key"] for part in parts]),
        labels=labels,
        z=np.concatenate([part["latent"] for part in parts]),
        metadata=manifest["metadata"],
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """Raises DataError where it is absent or damaged."""
    again = f"Run `ssl-ae extract {folder.parent.parent}`."
    try:
        found = files.read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no finished latents. {again}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}. {again}") from error
    if not isinstance(found, dict) or not {"rows", "parts", "metadata"} <= found.keys():
        raise DataError(f"{folder / MANIFEST} is damaged. {again}")
    return found


def _read_part(path: Path, footer: str | None) -> tables.Table:
    try:
        if footer not in (None, tables.footer_sha256(path)):
            raise DataError(f"{path} is damaged: its footer is not the one in {MANIFEST}.")
        return tables.read_parquet(path, ["key", "label", "latent"])
    except DataError as error:
        raise DataError(f"{error} To make it again, remove it and the {MANIFEST} beside it, and extract.") from error


def _is_of(path: Path, metadata: Mapping[str, str]) -> bool:
    try:
        return tables.read_metadata(path) == _with_version(metadata)
    except DataError:
        return False


def _with_version(metadata: Mapping[str, str]) -> dict[str, str]:
    return {"ssl_ae.schema_version": SCHEMA_VERSION, **metadata}


def filled(label: np.ndarray) -> np.ndarray:
    """The label column as arrays that training reads: (N,) int64 with -1, or (N, T) float32 with NaN."""
    if label.ndim == 2:
        return label.astype(np.float32)
    return np.ma.filled(label, UNLABELED).astype(np.int64)
