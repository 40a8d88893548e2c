"""What a component has to show, as plain arrays: it says what is seen, the room of figures says how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
