"""A folder of WebDataset shards without a card: the card they would have had, found by walking them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ae.data.card import SPLITS, Card, Shard, Split, X, Y
from ssl_ae.data.damage import FAIL, Loss, Memory, Tolerance, hashes, stamp_of, tell
from ssl_ae.data.holdout import holdout
from ssl_ae.data.keys import as_keys, repeated
from ssl_ae.data.moments import Moments, described
from ssl_ae.data.samples import not_finite
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
    losses: tuple[str, ...] = ()  # what was left out, a line for each split


@dataclass(frozen=True)
class _Good:
    """A shard and which of its rows can be used."""

    reader: ShardReader
    rows: np.ndarray  # (n,) int64


def read_foreign(folder: Path, tolerance: Tolerance = FAIL) -> Foreign:
    """Derive card, splits and labels of a folder of one-file-a-sample shards.

    Files called train*, val* and test* are those splits, anything else is train. Without val, one train sample in ten
    is held out by the hash of its key. Where two shards use one key, every key of the set becomes SHARD/KEY. All bytes
    are read once for the fingerprint, which is remembered, and, where x is not an image of bytes, for its figures.
    Where damage is to be skipped, every sample is decoded once to find it. Raises DataError.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(
            f"{folder} holds neither a card.json nor .tar shards. Make a data set: `ssl-ae data pack SOURCE {folder}`."
        )
    memory = Memory(folder)
    losses, shards = _sound(paths, memory) if tolerance.skip else ([], _alike(paths))
    keys = _unique_keys(shards)
    y, labels = _labels(folder, shards)
    hashed = hashes([good.reader.path for good in shards], memory)
    memory.save()
    entries = [_entry(good.reader, hashed[good.reader.path]) for good in shards]
    parts, splits = {}, {}
    for name in SPLITS:
        members = [at for at, good in enumerate(shards) if _split_of(good.reader.path) == name]
        if members:
            parts[name] = _part([shards[at] for at in members], [keys[at] for at in members])
            splits[name] = tuple(entries[at] for at in members)
    kept = {name: len(part.keys) for name, part in parts.items()}
    told = tell(losses, kept, str(folder), tolerance.limit)
    if "train" in parts and "val" not in parts:
        train, held = parts["train"], holdout(parts["train"].keys)
        parts["train"] = Part(train.readers, train.selection[~held], train.keys[~held])
        parts["val"] = Part(train.readers, train.selection[held], train.keys[held])
        splits["val"] = splits["train"]
    card = Card(
        name=folder.resolve().name,
        x=_described(shards[0].reader.x, parts),
        y=y,
        splits={name: Split(rows=len(parts[name].keys), shards=splits[name]) for name in SPLITS if name in parts},
        source=str(folder),
        left_out=_left_out(paths, shards),
    )
    return Foreign(card, parts, np.concatenate(keys), labels, tuple(told))


def _split_of(path: Path) -> str:
    return next((name for name in SPLITS if path.name.lower().startswith(name)), "train")


def _alike(paths: Sequence[Path]) -> list[_Good]:
    first = ShardReader(paths[0])
    readers = [first, *(ShardReader(path, first.x) for path in paths[1:])]
    return [_Good(reader, np.arange(reader.rows)) for reader in readers]


def _sound(paths: Sequence[Path], memory: Memory) -> tuple[list[Loss], list[_Good]]:
    """What of the shards can be used, and what cannot: single samples, or a shard whose archive is damaged.

    What a sample is says the first that can be read.
    """
    shards: list[_Good] = []
    losses: list[Loss] = []
    broken: list[tuple[Path, str]] = []
    for path in paths:
        try:
            good, bad = _sift(path, shards[0].reader.x if shards else None, memory)
        except DataError as error:
            broken.append((path, str(error)))
            continue
        losses += [Loss(_split_of(path), 1, reason) for reason in bad]
        if len(good.rows):
            shards.append(good)
    if not shards:
        raise DataError(f"{paths[0].parent}: no shard holds a sample that can be read. {broken[0][1] if broken else bad[0]}")
    rows = sum(good.reader.rows for good in shards)
    rows_a_byte, rows_a_shard = rows / sum(_size(good.reader.path) for good in shards), -(-rows // len(shards))
    losses += [Loss(_split_of(path), max(rows_a_shard, round(_size(path) * rows_a_byte)), why) for path, why in broken]
    return losses, shards


def _sift(path: Path, x: X | None, memory: Memory) -> tuple[_Good, list[str]]:
    """The rows of a shard that can be used, and what is wrong with the others; remembered, because all are decoded."""
    stamp = stamp_of(path)
    reader = ShardReader(path, x, tolerant=True)
    kind = f"{reader.x.dtype} {reader.x.shape}"
    known = memory.of(path).get("damage")
    if not (isinstance(known, dict) and known.get("x") == kind):
        found = reader.damage()
        known = {"x": kind, "rows": [*found], "reasons": [*found.values()]}
        memory.keep(path, stamp, damage=known)
    return _Good(reader, np.delete(np.arange(reader.rows), known["rows"])), known["reasons"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _entry(reader: ShardReader, sha256: str | DataError) -> Shard:
    if isinstance(sha256, DataError):
        raise sha256
    return Shard(file=reader.path.name, rows=reader.rows, bytes=reader.path.stat().st_size, sha256=sha256)


def _part(shards: Sequence[_Good], keys: Sequence[np.ndarray]) -> Part:
    starts = np.cumsum([0, *(good.reader.rows for good in shards)])
    selection = np.concatenate([start + good.rows for start, good in zip(starts[:-1], shards, strict=True)])
    return Part(tuple(good.reader for good in shards), selection, np.concatenate(keys))


def _left_out(paths: Sequence[Path], shards: Sequence[_Good]) -> dict[str, tuple[int, ...] | None]:
    kept = {good.reader.path: np.setdiff1d(np.arange(good.reader.rows), good.rows) for good in shards}
    return {path.name: tuple(kept[path].tolist()) if path in kept else None for path in paths if len(kept.get(path, [0]))}


def _unique_keys(shards: Sequence[_Good]) -> list[np.ndarray]:
    keys = [as_keys(good.reader.keys())[good.rows] for good in shards]
    if repeated(keys) is None:
        return keys
    return [as_keys([f"{good.reader.path.stem}/{key}" for key in part]) for good, part in zip(shards, keys, strict=True)]


def _labels(folder: Path, shards: Sequence[_Good]) -> tuple[Y | None, np.ndarray | None]:
    said: list[Any] = [label for good in shards for label in good.reader.labels(good.rows.tolist())]
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
                    raise DataError(not_finite(f"{reader.path}: sample {reader.keys()[row]}"))
                if name == "train":
                    train.add(samples)
    return described(x, every, train)
