"""A source turns somebody's files into keyed samples. `data pack` asks each known source whether it knows a place."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np

from ssl_ae.data.card import Task, X
from ssl_ae.data.keys import NumberedKeys
from ssl_ae.errors import DataError, listing

ROWS_A_BLOCK = 1024
BYTES_A_BLOCK = 64 * 2**20
TO_BE_MEASURED = (-np.inf, np.inf)  # an X.range that `pack` replaces by what it finds


@dataclass(frozen=True)
class PackOptions:
    """What the user may say about a source on the command line."""

    label: str | None = None  # column that holds the label, or several joined by commas (tables)
    key: str | None = None  # column that holds the key (tables)
    size: tuple[int, int] | None = None  # height, width to which images are resized
    task: Task | None = None  # None: classes unless the label column holds fractions
    draw: int | None = None  # seed of one draw of each train row's code, in place of its mean (latents)

    def allow(self, source: str, *names: str) -> None:
        """Raises DataError for an option that `source` would silently ignore."""
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in names:
                known = f"it knows {listing([f'--{name}' for name in names], 'and')}" if names else "it has no options"
                raise DataError(f"--{field.name} means nothing to the source {source!r}: {known}. Leave it out.")


@dataclass(frozen=True)
class Block:
    """Some samples of one split. Keys are unique in the whole data set."""

    keys: Sequence[str]  # n
    x: np.ndarray  # (n, *shape), the source's dtype
    labels: np.ndarray | None  # (n,) class index or -1, int64 | (n, T) float32, NaN where unknown | None


@dataclass(frozen=True)
class Description:
    """What a source knows before its samples are read."""

    name: str
    x: X  # its range may be TO_BE_MEASURED
    task: Task | None
    names: tuple[str, ...]  # of the classes or targets; empty without labels
    splits: tuple[str, ...]  # of train, val, test, in this order
    licence: str = ""


class Source(ABC):
    """One kind of place that samples come from."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for `ssl-ae plugins show`
    resizes: ClassVar[bool] = False  # whether `PackOptions.size` means something to it

    @classmethod
    @abstractmethod
    def recognises(cls, place: str) -> bool:
        """Whether `place` (a path, or the name of a data set) is of this kind. Cheap, and without side effects."""

    @abstractmethod
    def __init__(self, place: str, options: PackOptions) -> None:
        """Raises DataError when the place is of this kind but cannot be used as it is."""

    @abstractmethod
    def describe(self) -> Description: ...

    @abstractmethod
    def blocks(self, split: str) -> Iterator[Block]:
        """The samples of a split in an order that depends on the source alone. Memory is bounded by the block."""

    def keys(self, split: str) -> Sequence[str]:
        """All keys of a split, in the order of `blocks`. Override it where that is cheaper than reading the samples."""
        return [key for block in self.blocks(split) for key in block.keys]


def path_of(place: str) -> Path:
    return Path(os.path.expanduser(place))  # Path's own raises where `~name` is nobody's home


def holds_latents(folder: Path) -> bool:
    """Whether `ssl-ae extract` wrote it: the picture beside the tables is none of its samples."""
    return (folder / "train" / "_manifest.json").is_file()  # latents.MANIFEST, whose room takes its time to import


def name_of(place: str) -> str:
    """What to call a data set that comes from a file or folder: its name without an ending."""
    path = path_of(place).resolve()
    return path.name if path.is_dir() else path.name.split(".")[0]


def numbered_keys(split: str, start: int, stop: int) -> list[str]:
    """Keys of samples that have only a position: `train-00000017`, counted from 0."""
    return NumberedKeys(split, stop)[start:]


def rows_a_block(x: X) -> int:
    """How many samples to hold at once: at most 1,024 and, where samples are large, about 64 MiB of them."""
    return max(1, min(ROWS_A_BLOCK, BYTES_A_BLOCK // (x.size * np.dtype(x.dtype).itemsize)))
