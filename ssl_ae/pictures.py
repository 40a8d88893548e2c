"""What a component has to show, as plain arrays: it says what is seen, the room of figures says how it is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Tiles:
    """Weights or samples as small pictures, (n, C, H, W), or as profiles, (n, D) and (n, C, T).

    `signed` values are drawn from blue through white (zero) to red, each tile in its own range; others as samples are.
    """

    name: str  # of the file, such as `filters`
    title: str  # a sentence over the figure
    tiles: Tensor
    signed: bool = True


@dataclass(frozen=True)
class Histogram:
    """How often values occur."""

    name: str
    title: str
    values: Tensor  # (n,)
    label: str  # of the axis: what a value is, with its unit
    marks: Mapping[str, float] = field(default_factory=dict)  # {word: place} of vertical lines


@dataclass(frozen=True)
class Lines:
    """One curve a name over 1, 2, 3, ..."""

    name: str
    title: str
    lines: Mapping[str, Tensor]  # {name: (n,)}
    x_label: str
    y_label: str
    log: bool = False  # of the vertical axis


Picture = Tiles | Histogram | Lines


def check(picture: Picture) -> None:
    """Raises ValueError for what cannot be drawn: another type or name, numbers that are not finite or of another shape."""
    if not isinstance(picture, Picture):
        raise ValueError(f"a component's picture is Tiles, Histogram or Lines, not {type(picture).__name__}")
    kind = type(picture).__name__.lower()
    if not NAME.fullmatch(picture.name):
        raise ValueError(f"{kind} {picture.name!r}: a name is that of a file, of lower-case letters, digits, _ and -")
    if not picture.title.strip():
        raise ValueError(f"{kind} {picture.name!r} have no title: write a sentence that says what is seen")
    match picture:
        case Tiles(tiles=tiles):
            shape = tuple(tiles.shape)
            if len(shape) not in (2, 3, 4) or not tiles.numel() or not bool(tiles.isfinite().all()):
                raise ValueError(f"tiles {picture.name!r} must be finite numbers (n, C, H, W), (n, C, T) or (n, D); got {shape}")
        case Histogram(values=values):
            if values.dim() != 1 or not bool(values.isfinite().any()):
                raise ValueError(f"histogram {picture.name!r} needs values (n,), some finite; got {tuple(values.shape)}")
        case Lines(lines=lines):
            shapes = [tuple(values.shape) for values in lines.values()]
            if any(len(shape) != 1 for shape in shapes):
                raise ValueError(f"lines {picture.name!r} need values (n,) each; got {shapes}")
            if not any(bool((values.isfinite() & ((values > 0) | (not picture.log))).any()) for values in lines.values()):
                raise ValueError(f"lines {picture.name!r} have no {'positive' if picture.log else 'finite'} value")
