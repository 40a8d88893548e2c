"""What components show of themselves: weights as small pictures, a histogram, curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ssl_ae import pictures
from ssl_ae.figures.page import BLUE, CLASS_COLORS, FAINT, INK, LEGEND, ORANGE, PAPER, counted, joined, page, shortened, style
from ssl_ae.figures.samples import draw_profiles
from ssl_ae.pictures import Histogram, Lines, Picture, Tiles

MAX_TILES = 64
MAX_PROFILES = 40  # tiles that need axes of their own, which take longer
MAX_STACKED = 2  # channels of a signed tile that are drawn one below another; more are drawn as their mean
MAX_NAMED = 10  # curves with a line in the legend; more are too many to tell apart
MAX_BINS = 60
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0b3c75", "#3f84c0", "white", "#d6604d", "#8f1424"])


def draw(path: Path, picture: Picture) -> Path:
    """What a component would show, as PNG. Raises ValueError for numbers that are not finite or of another shape."""
    pictures.check(picture)
    match picture:
        case Tiles():
            return _draw_tiles(path, picture)
        case Histogram():
            return _draw_histogram(path, picture)
        case Lines():
            return _draw_lines(path, picture)


def _draw_tiles(path: Path, picture: Tiles) -> Path:
    """Up to 64 tiles: (n, C, H, W) as pictures; (n, D) and (n, C, T) as profiles, with bars where there are few numbers."""
    tiles = _numbers(picture.tiles)
    kind = {2: "vector", 3: "signal", 4: "image"}[tiles.ndim]
    most = MAX_TILES if kind == "image" else MAX_PROFILES
    detail = f"the first {most} of {len(tiles):,}" if len(tiles) > most else ""
    tiles = tiles[:most]
    if kind == "image":
        colors, note = _signed_colors(tiles) if picture.signed else _sample_colors(tiles)
        return _draw_mosaic(path, colors, picture.title, joined(detail, note))
    if picture.signed:
        tiles, detail = _in_own_range(tiles), joined(detail, "each in its own range, -1 to 1")
    numbers = [str(number) for number in range(1, len(tiles) + 1)]
    return draw_profiles(path, {"tile": tiles}, kind, picture.title, detail, numbers, signed=picture.signed)


def _in_own_range(tiles: np.ndarray) -> np.ndarray:
    """(n, ...) divided by the largest absolute value of each."""
    largest = np.abs(tiles.reshape(len(tiles), -1)).max(1)
    return tiles / np.where(largest > 0, largest, 1.0).reshape(-1, *[1] * (tiles.ndim - 1))


def _signed_colors(tiles: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, C, H, W) -> colours (n, H, W, 3 or 4), and what to say of them."""
    channels, width = tiles.shape[1], tiles.shape[3]
    if channels == 3:
        colors = (_in_own_range(tiles).transpose(0, 2, 3, 1) + 1) / 2
        return colors, "each in its own range, channels as red, green and blue, zero grey"
    note = "each in its own range, from blue through white (zero) to red"
    if channels > MAX_STACKED:
        return SIGNED((_in_own_range(tiles.mean(1)) + 1) / 2), joined(note, f"mean of the {channels} channels")
    gap = np.zeros((len(tiles), 1, width))  # a white row between channels
    stacked = [part for channel in range(channels) for part in (gap, tiles[:, channel])][1:]
    note = joined(note, f"{channels} channels below one another" if channels > 1 else "")
    return SIGNED((_in_own_range(np.concatenate(stacked, axis=1)) + 1) / 2), note


def _sample_colors(tiles: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, C, H, W) -> greys or colours (n, H, W, 3), all tiles on one scale, and what to say of them."""
    channels = tiles.shape[1]
    note = "" if channels in (1, 3) else f"mean of the {channels} channels"
    tiles = tiles if channels == 3 else tiles.mean(1, keepdims=True).repeat(3, axis=1)
    low, high = min(0.0, tiles.min()), tiles.max()
    return ((tiles - low) / ((high - low) or 1.0)).transpose(0, 2, 3, 1), note


def _draw_mosaic(path: Path, tiles: np.ndarray, title: str, detail: str) -> Path:
    """Pictures (n, H, W, colours) on one axes, because many axes take long to lay out."""
    high, wide = tiles.shape[1:3]
    columns = _columns(len(tiles))
    rows = -(-len(tiles) // columns)
    cell, gap = 0.86, 0.07  # width of a tile and space between tiles, in inches
    tall = cell * min(max(high / wide, 0.4), 2.5)
    width, height = columns * (cell + gap) - gap, rows * (tall + gap) - gap
    smoothing = "nearest" if max(high, wide) <= 64 else "antialiased"
    with page(path, width + 0.3, height + 0.2, title, detail) as figure:
        axes = figure.add_subplot(anchor="NW")
        axes.set_axis_off()
        for place, tile in enumerate(tiles):
            left, top = (place % columns) * (cell + gap), -(place // columns) * (tall + gap)
            axes.imshow(tile, extent=(left, left + cell, top - tall, top), interpolation=smoothing)
            axes.add_patch(Rectangle((left, top - tall), cell, tall, fill=False, edgecolor=FAINT, linewidth=0.8))
        axes.set(aspect="equal", xlim=(-0.02, width + 0.02), ylim=(-height - 0.02, 0.02))
    return path


def _columns(count: int) -> int:
    """Tiles in a row, 10 at most: the number that leaves the fewest places empty."""
    if count <= 10:
        return count
    return min(range(10, 5, -1), key=lambda columns: -count % columns)


def _draw_histogram(path: Path, picture: Histogram) -> Path:
    values = _numbers(picture.values)
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    detail = joined(
        counted(len(finite), "value"),
        f"mean {finite.mean():.3g}, median {np.median(finite):.3g}",
        f"{counted(lost, 'value')} not finite left out" if lost else "",
    )
    with page(path, 6.4, 3.2, picture.title, detail) as figure:
        axes = figure.add_subplot()
        style(axes)
        axes.hist(finite, _bins(finite), color=BLUE, edgecolor="white", linewidth=0.4)
        axes.grid(axis="y", color=PAPER)
        axes.set_axisbelow(True)
        axes.set_xlabel(picture.label, fontsize=9, color=INK)
        axes.set_ylabel("values", fontsize=9, color=INK)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        for word, place in picture.marks.items():
            axes.axvline(place, color=ORANGE, linewidth=1.4)
            at, shift = ("data", "axes fraction"), "offset points"
            axes.annotate(f"{word} {place:.3g}", (place, 1), (4, -2), at, shift, va="top", fontsize=8, color=INK)
    return path


def _bins(finite: np.ndarray) -> np.ndarray:
    edges = np.histogram_bin_edges(finite, "auto")
    return edges if len(edges) <= MAX_BINS + 1 else np.histogram_bin_edges(finite, MAX_BINS)


def _draw_lines(path: Path, picture: Lines) -> Path:
    lines = {name: _numbers(values) for name, values in picture.lines.items()}
    many = len(lines) > MAX_NAMED
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(lines))) if many else CLASS_COLORS[0]
    detail = joined(counted(len(lines), "curve") if many else "", "logarithmic scale" if picture.log else "")
    with page(path, 6.4, 3.4, picture.title, detail) as figure:
        axes = figure.add_subplot()
        style(axes)
        axes.grid(axis="y", color=PAPER)
        axes.set_axisbelow(True)
        for (name, values), color in zip(lines.items(), colors, strict=False):
            shown = np.where(values > 0, values, np.nan) if picture.log else values
            look = "o-" if len(values) <= 12 else "-"  # a line through one point is invisible
            places = np.arange(1, len(values) + 1)
            width = 0.8 if many else 1.5
            axes.plot(places, shown, look, color=color, linewidth=width, markersize=3, label=shortened(name, 40))
        if picture.log:
            axes.set_yscale("log")
            axes.tick_params(axis="y", which="minor", labelsize=7, labelcolor=INK, color=FAINT)
        axes.set_xlim(0.5, max(map(len, lines.values())) + 0.5)
        axes.set_xlabel(picture.x_label, fontsize=9, color=INK)
        axes.set_ylabel(picture.y_label, fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if len(lines) > 1 and not many:
            axes.legend(**LEGEND)
    return path


def _numbers(values: Tensor) -> np.ndarray:
    """Of any device and precision, on the host."""
    return values.detach().double().cpu().numpy()
