"""`data pack`: any source to shards, a label table and a card. `data inspect`: what such a folder holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ae import files
from ssl_ae.data import card as cards
from ssl_ae.data.card import Card, Shard, Split, X, Y
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.holdout import holdout
from ssl_ae.data.keys import as_keys, repeated
from ssl_ae.data.labels import UNLABELED, LabelTable
from ssl_ae.data.moments import Moments, described
from ssl_ae.data.remote import scheme_of
from ssl_ae.data.shards import ShardReader, ShardWriter, verify_sha256
from ssl_ae.data.sources import TO_BE_MEASURED, Block, PackOptions, Source, path_of
from ssl_ae.errors import DataError, listing

CHANGED = "changed since packing"


def pack(
    source: str,
    out: Path,
    options: PackOptions,
    sources: Sequence[type[Source]],
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> Card:
    """Write the data set that `source`, a path or a name, stands for into the folder `out`; return its card.

    Where the source has no val split, `holdout` takes one train sample in ten. The same source gives the same bytes.
    The folder appears whole or not at all. One that already holds the same data set, undamaged, stays as it is, with
    whatever labels were added since; one that holds another is replaced only with `overwrite`.
    `progress` is told how many samples have just been written.

    Raises DataError for a source that no class in `sources` or more than one knows, that is not what its class expects,
    or that uses a key twice, and for an `out` that cannot be written or is taken.
    """
    out = path_of(str(out)).resolve()  # through a link, so that the folder can be renamed into its place
    _refuse_taken(out)
    try:
        kind = _kind_of(source, sources)
        origin = f"{kind.name}:{path_of(source).resolve().name}"  # no path: the same source gives the same card anywhere
        opened = kind(source, options)
        with files.folder_aside(out) as folder:
            card = _Packing(opened, folder, progress).run(origin)
            if (out / cards.FILE_NAME).exists():
                if _holds(out, card):
                    return card
                if not overwrite:
                    raise DataError(
                        f"{out} holds another data set, or a damaged copy of this one. "
                        "Choose another folder, or replace it with --overwrite."
                    )
            _refuse_taken(out)  # again, because packing takes its time
            files.move_folder(folder, out)
    except OSError as error:
        raise DataError(f"cannot pack {source} into {out}: {error}.") from error
    return card


def inspect(data: DataSet) -> dict[str, Any]:
    """What a data set holds and whether it is whole; every byte is read once.

    name, source, licence, fingerprint; x and y as the card has them; splits: {split: {rows, labeled, classes: {class:
    rows}}}, classes being None for other tasks, and both where damage prevents counting; shards: [{split, file, rows,
    bytes, verdict}]; labels: {file, verdict} or None; damaged: [file, ...]. A verdict is "ok" or says what is wrong,
    and for labels "changed since packing", which is no damage.
    """
    card = data.card
    shards = [
        {"split": name, **shard.model_dump(exclude={"sha256"}), "verdict": _verdict(data.local, card.x, shard)}
        for name, split in card.splits.items()
        for shard in split.shards
    ]
    labels = _label_verdict(data)
    files_seen = [*shards, *([labels] if labels else [])]
    damaged = sorted({entry["file"] for entry in files_seen if entry["verdict"] not in ("ok", CHANGED)})
    return {
        "name": card.name,
        "source": card.source,
        "licence": card.licence,
        "fingerprint": card.fingerprint,
        "x": card.x.model_dump(mode="json"),
        "y": card.y.model_dump(mode="json") if card.y else None,
        "splits": {name: _counts(data, name, damaged) for name in card.splits},
        "shards": shards,
        "labels": labels,
        "damaged": damaged,
    }


class _Packing:
    """One source on its way into one folder."""

    def __init__(self, source: Source, folder: Path, progress: Callable[[int], None] | None) -> None:
        self._source, self._folder, self._progress = source, folder, progress
        self._about = source.describe()
        self._every, self._train = Moments(), Moments()
        self._measures = self._about.x.kind == "vector" or self._about.x.range == TO_BE_MEASURED
        self._labels: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}  # keys and labels, by split

    def run(self, origin: str) -> Card:
        about = self._about
        if "train" not in about.splits:
            raise DataError(f"{origin} has no train split, only {listing(about.splits, 'and')}. Add train samples.")
        keys = {split: self._source.keys(split) for split in about.splits}
        _refuse_repeated(keys, origin)
        held = np.zeros(len(keys["train"]), dtype=bool) if "val" in keys else holdout(keys["train"])
        splits: dict[str, Split] = {}
        for name in about.splits:
            splits |= self._write(name, keys[name], held if name == "train" else None)
        y = Y(task=about.task, names=about.names) if about.task and self._labels else None
        card = Card(
            name=about.name,
            x=self._measured(),
            y=y,
            splits={name: splits[name] for name in cards.SPLITS if name in splits},
            labels_sha256=self._write_labels() if y else None,
            source=origin,
            licence=about.licence,
        )
        card.save(self._folder)
        return card

    def _write(self, name: str, keys: Sequence[str], held: np.ndarray | None) -> dict[str, Split]:
        """Write one split of the source; where some rows are held out, they are written as val."""
        held = np.zeros(len(keys), dtype=bool) if held is None else held
        with contextlib.ExitStack() as stack:
            main = stack.enter_context(ShardWriter(self._folder, name))
            val = stack.enter_context(ShardWriter(self._folder, "val")) if held.any() else None
            row = 0
            for block in self._source.blocks(name):
                stop = row + len(block.keys)
                if list(block.keys) != list(keys[row:stop]):
                    raise DataError(f"{name} changed between two readings of the source. Pack again once it is still.")
                self._check(block)
                away = held[row:stop]
                for writer, chosen in ((main, ~away), (val, away)):
                    if chosen.any():
                        writer.write(list(compress(block.keys, chosen.tolist())), block.x[chosen])
                        self._take_labels(name if writer is main else "val", block, chosen)
                if self._measures:
                    self._every.add(block.x)
                    if name == "train":
                        self._train.add(block.x[~away])
                row = stop
                if self._progress:
                    self._progress(len(block.keys))
            if row != len(keys):
                raise DataError(f"{name} ended after {row} of {len(keys)} samples. Pack again once the source is still.")
            written = {name: main.close(), **({"val": val.close()} if val else {})}
        return {split: Split(rows=sum(shard.rows for shard in shards), shards=shards) for split, shards in written.items()}

    def _check(self, block: Block) -> None:
        x = self._about.x
        if block.x.dtype != x.dtype or block.x.shape[1:] != x.shape:
            raise DataError(
                f"sample {block.keys[0]} is {block.x.dtype} {block.x.shape[1:]}, but the source promised {x.dtype} "
                f"{x.shape}. All samples must be alike."
            )
        low, high = float(block.x.min()), float(block.x.max())
        if not (np.isfinite([low, high]).all() and x.range[0] <= low and high <= x.range[1]):
            wrong = ~((block.x >= x.range[0]) & (block.x <= x.range[1]) & np.isfinite(block.x))
            row = int(wrong.reshape(len(wrong), -1).any(axis=1).argmax())
            raise DataError(
                f"sample {block.keys[row]} holds {block.x[row][wrong[row]][0]}, which is not a number from "
                f"{x.range[0]:g} to {x.range[1]:g}. Correct it or leave it out."
            )

    def _take_labels(self, split: str, block: Block, chosen: np.ndarray) -> None:
        if block.labels is None:
            return
        known = block.labels != UNLABELED if block.labels.ndim == 1 else ~np.isnan(block.labels).all(axis=1)
        known &= chosen
        if known.any():
            self._labels.setdefault(split, []).append((as_keys(block.keys)[known], block.labels[known]))

    def _write_labels(self) -> str:
        """Split by split, each in its own order: so `rows_of` finds a split's labels without a search."""
        path = self._folder / cards.LABELS_FILE_NAME
        keys, labels = zip(*chain.from_iterable(self._labels.values()), strict=True)
        LabelTable(np.concatenate(keys), np.concatenate(labels)).write(path)
        return files.sha256_of(path)

    def _measured(self) -> X:
        x = self._about.x
        found = described(x, self._every, self._train)
        return found if x.range == TO_BE_MEASURED else found.model_copy(update={"range": x.range})


def _refuse_taken(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Name a folder for the data set.")
    if out.is_dir() and any(out.iterdir()) and not (out / cards.FILE_NAME).exists():
        raise DataError(f"{out} holds other files, and no data set. Name a new or empty folder for the data set.")


def _kind_of(source: str, sources: Sequence[type[Source]]) -> type[Source]:
    path = path_of(source)
    if (path / cards.FILE_NAME).exists():
        raise DataError(f"{source} is a data set already. Train on it as it is: data.path = {source}.")
    found = [kind for kind in sources if kind.recognises(source)]
    if len(found) == 1:
        return found[0]
    if found:
        kinds = listing([f"{kind.name} ({kind.summary})" for kind in found], "and")
        raise DataError(f"{source} is of several kinds: {kinds}. Move the files of each into a folder of its own.")
    known = "".join(f"\n  {kind.name}: {kind.summary}" for kind in sources)
    if not path.exists():
        scheme_of(source)
        raise DataError(f"{source} is neither a file, nor a folder, nor a known name. A source is one of:{known}")
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(f"{source} is an empty folder. Put the samples into it; a source is one of:{known}")
    raise DataError(f"{source} is nothing that can be packed. A source is one of:{known}")


def _refuse_repeated(keys: dict[str, Sequence[str]], origin: str) -> None:
    for split, some in keys.items():
        if len(some) == 0:
            raise DataError(f"{origin}: the split {split} holds no samples. Add some, or leave it out.")
    if (key := repeated([*keys.values()])) is not None:
        raise DataError(f"{origin}: the key {key!r} stands for two samples. Give each its own.")


def _holds(out: Path, card: Card) -> bool:
    """Whether `out` is the data set of `card`, every byte of it; its labels may have changed since."""
    try:
        if Card.load(out) != card:
            return False
    except DataError:
        return False
    whole = all(
        _verdict(lambda shard: out / shard.file, card.x, shard) == "ok"
        for split in card.splits.values()
        for shard in split.shards
    )
    return whole and (card.y is None or (out / cards.LABELS_FILE_NAME).exists())


def _verdict(place: Callable[[Shard], Path], x: X, shard: Shard) -> str:
    try:
        path = ShardReader(place(shard), x, shard).path
        verify_sha256(path, shard)
    except DataError as error:
        return str(error)
    return "ok"


def _label_verdict(data: DataSet) -> dict[str, str] | None:
    path = data.folder / cards.LABELS_FILE_NAME
    if data.card.labels_sha256 is None:
        return None
    try:
        _ = data.label_table
    except DataError as error:
        return {"file": path.name, "verdict": str(error)}
    same = files.sha256_of(path) == data.card.labels_sha256
    return {"file": path.name, "verdict": "ok" if same else CHANGED}


def _counts(data: DataSet, name: str, damaged: Sequence[str]) -> dict[str, Any]:
    split, y = data.card.split(name), data.card.y
    unreadable = {cards.LABELS_FILE_NAME, *(shard.file for shard in split.shards)} & set(damaged)
    if unreadable:
        return {"rows": split.rows, "labeled": None, "classes": None}
    labels = data.labels(name)
    if labels.ndim == 2:
        return {"rows": split.rows, "labeled": int((~np.isnan(labels)).any(axis=1).sum()), "classes": None}
    counts = np.bincount(labels[labels != UNLABELED], minlength=len(y.names) if y else 0)
    classes = dict(zip(y.names, counts.tolist(), strict=True)) if y else None
    return {"rows": split.rows, "labeled": int(counts.sum()), "classes": classes}
