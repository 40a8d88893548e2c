"""A folder of WebDataset shards without a card: the card they would have had, found by walking them once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ae import files
from ssl_ae.data.card import SPLITS, Card, Shard, Split, X, Y
from ssl_ae.data.holdout import holdout
from ssl_ae.data.keys import as_keys, repeated
from ssl_ae.data.moments import Moments, described
from ssl_ae.data.shards import BLOCK_ROWS, ShardReader
from ssl_ae.data.sources.targets import targets_of
from ssl_ae.errors import DataError


@dataclass(frozen=True)
class Part:
    """The samples of one split: some rows of its shards laid end to end."""

    readers: tuple[ShardReader, ...]
    selection: np.ndarray  # (n,) int64
    keys: np.ndarray  # (n,) text, by `as_keys`


@dataclass(frozen=True)
class Foreign:
    card: Card
    parts: dict[str, Part]
    keys: np.ndarray  # (n,) of every sample, in the order of `labels`
    labels: np.ndarray | None  # (n,) int64 | (n, T) float32, None when no sample has one


def read_foreign(folder: Path) -> Foreign:
    """Derive card, splits and labels of a folder of one-file-a-sample shards.

    Files called train*, val* and test* are those splits, anything else is train. Without val, one train sample in ten
    is held out by the hash of its key. Where two shards use one key, every key of the set becomes SHARD/KEY. All bytes
    are read once for the fingerprint and, where x is not an image of bytes, its figures. Raises DataError.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(
            f"{folder} holds neither a card.json nor .tar shards. Make a data set: `ssl-ae data pack SOURCE {folder}`."
        )
    readers = _open_alike(paths)
    keys = _unique_keys(readers)
    y, labels = _labels(folder, readers)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(files.sha256_of, paths))
    shards = [
        Shard(file=path.name, rows=reader.rows, bytes=path.stat().st_size, sha256=sha256)
        for path, reader, sha256 in zip(paths, readers, hashes, strict=True)
    ]
    parts, entries = {}, {}
    for name in SPLITS:
        members = [at for at, path in enumerate(paths) if _split_of(path) == name]
        if members:
            found = np.concatenate([keys[at] for at in members])
            parts[name] = Part(tuple(readers[at] for at in members), np.arange(len(found)), found)
            entries[name] = tuple(shards[at] for at in members)
    if "train" in parts and "val" not in parts:
        train, held = parts["train"], holdout(parts["train"].keys)
        parts["train"] = Part(train.readers, train.selection[~held], train.keys[~held])
        parts["val"] = Part(train.readers, train.selection[held], train.keys[held])
        entries["val"] = entries["train"]
    card = Card(
        name=folder.resolve().name,
        x=_described(readers[0].x, parts),
        y=y,
        splits={name: Split(rows=len(parts[name].keys), shards=entries[name]) for name in SPLITS if name in parts},
        source=str(folder),
    )
    return Foreign(card, parts, np.concatenate(keys), labels)


def _split_of(path: Path) -> str:
    return next((name for name in SPLITS if path.name.lower().startswith(name)), "train")


def _open_alike(paths: Sequence[Path]) -> list[ShardReader]:
    first = ShardReader(paths[0])
    return [first, *(ShardReader(path, first.x) for path in paths[1:])]


def _unique_keys(readers: Sequence[ShardReader]) -> list[np.ndarray]:
    keys = [as_keys(reader.keys()) for reader in readers]
    if repeated(keys) is None:
        return keys
    return [as_keys([f"{reader.path.stem}/{key}" for key in part]) for reader, part in zip(readers, keys, strict=True)]


def _labels(folder: Path, readers: Sequence[ShardReader]) -> tuple[Y | None, np.ndarray | None]:
    said: list[Any] = [label for reader in readers for label in reader.labels()]
    widths = {len(label) if isinstance(label, list) else None for label in said if label is not None}
    if len(widths) > 1:
        raise DataError(f"{folder}: labels differ in length: expected one value a sample, or as many numbers in each.")
    width = widths.pop() if widths else None
    if width is None:
        columns = {"label": np.array(said, dtype=object)}
    else:
        rows = np.array([label or [np.nan] * width for label in said], dtype=np.float64)
        columns = {f"label_{index}": rows[:, index] for index in range(width)}
    found = targets_of(columns, None, str(folder))
    return (Y(task=found.task, names=found.names), found.values) if found.task else (None, None)


def _described(x: X, parts: dict[str, Part]) -> X:
    """`x` with the figures that only the samples can tell; images of bytes need none."""
    if x.dtype == "uint8" and x.kind != "vector":
        return x
    every, train = Moments(), Moments()
    for name, part in parts.items():
        starts = np.cumsum([0, *(reader.rows for reader in part.readers)])
        for reader, start, end in zip(part.readers, starts[:-1], starts[1:], strict=True):
            rows = part.selection[(part.selection >= start) & (part.selection < end)] - start
            for block in np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS)):
                samples = reader.read(block)
                every.add(samples)
                if not every.finite:
                    row = int(block[~np.isfinite(samples).reshape(len(block), -1).all(axis=1)][0])
                    raise DataError(f"{reader.path}: sample {reader.keys()[row]} holds NaN or infinity. Correct it.")
                if name == "train":
                    train.add(samples)
    return described(x, every, train)
