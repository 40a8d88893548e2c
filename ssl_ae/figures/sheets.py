"""Sheets of decoded codes, whose rows and columns mean something: a plane of codes, one dimension, the way from code to code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.patches import Rectangle

from ssl_ae.figures.page import BLUE, FAINT, INK, PAPER, WIDE, Kind, joined, page
from ssl_ae.figures.samples import MAX_BARS, MAX_CHANNELS, comparable

MAX_CELLS = 100  # samples of a sheet that has no rows and columns of its own
MAX_TICKS = 12  # numbers along a side of the plane
MAX_POINTS = 600  # values of a line before it is drawn by its envelope
GAP = 0.06  # inches between cells
SEAMLESS = 16  # pixels a side from which images of a plane run into each other: smaller ones have no margin of their own
SIZE = 8  # points, of what is written along the sides

Range = tuple[float, float]  # the values drawn black and white in images; None: the smallest (or 0) and largest there are


@dataclass(frozen=True)
class Side:
    """What is written along one side of a sheet: the names of some cells, and what they mean."""

    names: Sequence[str] = ()
    places: Sequence[int] | None = None  # the cells that have these names; None: every cell, in order
    label: str = ""


@dataclass(frozen=True)
class Grid:
    """Where the cells of a sheet lie, in inches: columns from left to right, rows downwards from 0."""

    wide: float
    tall: float
    left: np.ndarray  # (C,)
    bottom: np.ndarray  # (R,)

    @property
    def size(self) -> tuple[float, float]:
        return float(self.left[-1]) + self.wide, -float(self.bottom[-1])


def sample_sheet(path: Path, x: np.ndarray, kind: Kind, title: str, detail: str = "", limits: Range | None = None) -> Path:
    """Up to 100 samples (n, *shape of a sample) close together, in the order they come."""
    shown = np.asarray(x[:MAX_CELLS], float)
    if not len(shown):
        raise ValueError("a sheet needs at least one sample, got none")
    columns = _columns(len(shown))
    empty = np.full((-len(shown) % columns, *shown.shape[1:]), np.nan)
    cells = np.concatenate([shown, empty]).reshape(-1, columns, *shown.shape[1:])
    more = f"the first {MAX_CELLS} of {len(x):,}" if len(x) > MAX_CELLS else ""
    return _draw(path, cells, kind, title, joined(more, detail), limits)


def latent_plane(
    path: Path,
    x: np.ndarray,
    kind: Kind,
    across: np.ndarray,
    up: np.ndarray,
    title: str,
    detail: str = "",
    limits: Range | None = None,
) -> Path:
    """What each point of a plane of codes decodes to: x (R, C, *shape of a sample).

    `across` (C,) are the values of z1 from left to right, `up` (R,) those of z2 from top to bottom, so the largest first.
    """
    if x.shape[:2] != (len(up), len(across)):
        raise ValueError(f"a plane of {len(up)} x {len(across)} values needs as many samples, got {x.shape[:2]}")
    gap = 0.0 if kind == "image" and min(x.shape[-2:]) >= SEAMLESS else GAP
    return _draw(path, np.asarray(x, float), kind, title, detail, limits, _ticks(across, "z1"), _ticks(up, "z2"), gap)


def latent_traversal(
    path: Path, x: np.ndarray, kind: Kind, values: Side, samples: Side, title: str, detail: str = "", limits: Range | None = None
) -> Path:
    """One latent dimension through its values: x (R, C, *shape of a sample), a row a sample, a column a value."""
    if x.shape[:2] != (len(samples.names), len(values.names)):
        raise ValueError(f"{len(samples.names)} samples at {len(values.names)} values need as many cells, got {x.shape[:2]}")
    named = replace(samples, names=[_end(name, 24) for name in samples.names])
    return _draw(path, np.asarray(x, float), kind, title, detail, limits, values, named)


def latent_interpolation(
    path: Path, x: np.ndarray, ends: np.ndarray, names: Sequence[str], kind: Kind, title: str, limits: Range | None = None
) -> Path:
    """The way from one code to another, decoded: x (n, *shape of a sample), between the samples `ends` (2, *shape) themselves.

    The originals stand in frames, over their `names`.
    """
    if len(x) < 2 or len(ends) != 2 or x.shape[1:] != ends.shape[1:]:
        raise ValueError(f"an interpolation needs two codes at least, between two samples; got {x.shape} and {ends.shape}")
    cells = np.concatenate([ends[:1], x, ends[1:]])[None].astype(float)
    first, last = (f"{_end(name, 14)}\noriginal" for name in names)
    parts = [f"{part:.2g}" for part in np.linspace(0, 1, len(x))]
    across = Side([first, *parts, last])
    detail = "between the two samples: their codes and the straight line from one to the other, decoded"
    return _draw(path, cells, kind, title, detail, limits, across, framed=(0, len(x) + 1))


def numbered(values: np.ndarray, label: str) -> Side:
    """Every cell under its value."""
    return Side([f"{value:.3g}".replace("-", "−") for value in np.asarray(values) + 0.0], label=label)


def _end(name: str, length: int) -> str:
    """Keys differ in their last letters."""
    return name if len(name) <= length else "…" + name[1 - length :]


def _ticks(values: np.ndarray, label: str) -> Side:
    """Every cell, or evenly some of them, under its value."""
    step = -(-len(values) // MAX_TICKS)
    places = list(range((len(values) - 1) % step // 2, len(values), step))
    names = [f"{value:.2f}".replace("-", "−") for value in np.asarray(values)[places] + 0.0]
    return Side(names, places, label)


def _columns(count: int) -> int:
    """Cells in a row: the number near a square that leaves the fewest places empty."""
    root = max(1, round(count**0.5))
    return min(range(root, min(root + 3, count) + 1), key=lambda columns: (-count % columns, columns))


def _draw(
    path: Path,
    cells: np.ndarray,
    kind: Kind,
    title: str,
    detail: str,
    limits: Range | None,
    across: Side = Side(),
    up: Side = Side(),
    gap: float = GAP,
    framed: Sequence[int] = (),
) -> Path:
    """Cells (R, C, *shape of a sample) on one axes, because many axes take long to lay out; a cell of NaN stays empty."""
    if cells.ndim != {"image": 5, "signal": 4, "vector": 3}[kind] or not cells.size:
        raise ValueError(f"cells of {kind}s are (rows, columns, *shape of a sample), got {cells.shape}")
    grid = _grid(cells, kind, gap, framed)
    zero = None
    if kind == "image":
        drawn, note = _colors(cells, limits)
    else:
        drawn, zero, note = _heights(cells, kind)
    beside = max((WIDE * SIZE * len(name) for name in up.names), default=0.0) + (0.3 if up.label else 0.0)
    below = 0.2 * max((1 + name.count("\n") for name in across.names), default=0) + (0.25 if across.label else 0.0)
    width, height = grid.size
    with page(path, max(width + beside + 0.4, 2.4), height + below + 0.2, title, joined(detail, note)) as figure:
        axes = figure.add_subplot(anchor="NW")
        if kind == "image":
            _draw_images(axes, drawn, grid, seamless=not gap)
        else:
            bars = kind == "vector" and cells.shape[-1] <= MAX_BARS
            _draw_profiles(axes, drawn, grid, zero if bars else None)
        for column in framed:
            axes.add_patch(Rectangle((grid.left[column], -height), grid.wide, height, fill=False, edgecolor=BLUE, linewidth=2))
        axes.set(aspect="equal", xlim=(-0.03, width + 0.03), ylim=(-height - 0.03, 0.03))
        _write_sides(axes, grid, across, up)
    return path


def _grid(cells: np.ndarray, kind: Kind, gap: float, framed: Sequence[int]) -> Grid:
    rows, columns = cells.shape[:2]
    image = kind == "image"
    shape = min(max(cells.shape[-2] / cells.shape[-1], 0.4), 2.5) if image else 0.6  # height over width
    wide = float(np.clip(9.0 / columns, 0.34, 0.86 if image else 1.5))
    left = np.arange(columns) * (wide + gap)
    for column in framed:  # a little apart from what is decoded
        left[column + (column == 0) :] += 2 * GAP
    tall = wide * shape
    return Grid(wide, tall, left, gap - np.arange(1, rows + 1) * (tall + gap))


def _colors(cells: np.ndarray, limits: Range | None) -> tuple[np.ndarray, str]:
    """Images (R, C, channels, H, W) -> (R, C, H, W, 3) in [0, 1], and what to say of them."""
    channels = cells.shape[2]
    note = "" if channels in (1, 3) else f"mean of the {channels} channels"
    if channels != 3:
        cells = cells.mean(axis=2, keepdims=True).repeat(3, axis=2)
    low, high = limits or (min(0.0, np.nanmin(cells)), np.nanmax(cells))
    return np.clip((np.moveaxis(cells, 2, -1) - low) / ((high - low) or 1.0), 0, 1), note


def _heights(cells: np.ndarray, kind: Kind) -> tuple[np.ndarray, float, str]:
    """Vectors (R, C, D), signals (R, C, channels, T) -> (R, C, channels, T) in [0, 1], where 0 lies, and what to say of them."""
    scaled = ""
    if kind == "vector":
        flat = cells.reshape(-1, 1, cells.shape[-1])
        there = ~np.isnan(flat).all((1, 2))
        layers, scaled = comparable({"decoded": flat[there]})
        flat = np.full(flat.shape, np.nan)
        flat[there] = layers["decoded"]
        cells = flat.reshape(*cells.shape[:2], 1, -1)
    note = f"the first {MAX_CHANNELS} of {cells.shape[2]} channels" if cells.shape[2] > MAX_CHANNELS else ""
    cells = _envelope(cells[:, :, :MAX_CHANNELS])
    low, high = np.nanmin(cells), np.nanmax(cells)
    span = (high - low) or 1.0
    return (cells - low) / span, float(np.clip(-low / span, 0, 1)), joined(note, scaled or f"all from {low:.3g} to {high:.3g}")


def _envelope(cells: np.ndarray) -> np.ndarray:
    """(..., T) with the lowest and highest of each stretch where a cell has no room for all: no peak is lost."""
    if cells.shape[-1] <= MAX_POINTS:
        return cells
    edges = np.linspace(0, cells.shape[-1], MAX_POINTS // 2, endpoint=False).astype(int)
    ends = [np.minimum.reduceat(cells, edges, axis=-1), np.maximum.reduceat(cells, edges, axis=-1)]
    return np.stack(ends, axis=-1).reshape(*cells.shape[:-1], -1)


def _draw_images(axes: Axes, colors: np.ndarray, grid: Grid, seamless: bool) -> None:
    rows, columns, high, wide = colors.shape[:4]
    smoothing = "nearest" if max(high, wide) <= 64 else "antialiased"
    if seamless:
        mosaic = colors.transpose(0, 2, 1, 3, 4).reshape(rows * high, columns * wide, 3)
        width, height = grid.size
        axes.imshow(mosaic, extent=(0, width, -height, 0), interpolation=smoothing)
        return
    for row, column in zip(*np.nonzero(~np.isnan(colors).all((2, 3, 4))), strict=True):
        x, y = grid.left[column], grid.bottom[row]
        axes.imshow(colors[row, column], extent=(x, x + grid.wide, y, y + grid.tall), interpolation=smoothing)
        axes.add_patch(Rectangle((x, y), grid.wide, grid.tall, fill=False, edgecolor=FAINT, linewidth=0.8))


def _draw_profiles(axes: Axes, heights: np.ndarray, grid: Grid, zero: float | None) -> None:
    """A panel a cell, channels one below another in it; with `zero`, bars that start there."""
    channels, length = heights.shape[2:]
    across = (np.arange(length) + 0.5) / length * grid.wide
    band, panels, lines = grid.tall / channels, [], []
    for row, column in zip(*np.nonzero(~np.isnan(heights).all((2, 3))), strict=True):
        x, y = grid.left[column], grid.bottom[row]
        panels.append(Rectangle((x, y), grid.wide, grid.tall))
        for channel, values in enumerate(heights[row, column]):
            foot = y + grid.tall - (channel + 0.95) * band
            ends = [values] if zero is None else [np.full(length, zero), values]
            points = np.stack([np.column_stack([x + across, foot + 0.9 * band * end]) for end in ends], axis=1)  # (T, 1 or 2, 2)
            lines += [points[:, 0]] if zero is None else list(points)
    width = 0.8 if zero is None else 0.8 * 72 * grid.wide / length  # points; bars leave a fifth between them
    axes.add_collection(PatchCollection(panels, facecolor=PAPER, edgecolor="none"))
    axes.add_collection(LineCollection(lines, colors=[BLUE], linewidths=width, capstyle="butt" if zero is not None else "round"))


def _write_sides(axes: Axes, grid: Grid, across: Side, up: Side) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=SIZE, labelcolor=INK, pad=2)
    middles = grid.left + grid.wide / 2, grid.bottom + grid.tall / 2
    for side, middle, write in ((across, middles[0], axes.set_xticks), (up, middles[1], axes.set_yticks)):
        places = range(len(side.names)) if side.places is None else side.places
        write([middle[place] for place in places], side.names)
    axes.set_xlabel(across.label, fontsize=9, color=INK)
    axes.set_ylabel(up.label, fontsize=9, color=INK)
