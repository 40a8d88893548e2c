"""Samples to look at: alone, or beside what a model made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from ssl_ae.figures.page import BLUE, FAINT, GREY, INK, LEGEND, Kind, Layers, counted, joined, page, shortened, style

MAX_COLUMNS = 10  # samples of a reconstruction figure
MAX_SAMPLES = 40  # samples of a grid
MAX_CHANNELS = 4  # channels of a signal
MAX_BARS = 40  # features of a vector drawn as bars, more as a line
MAX_LINE = 4_000  # values of a line before it is drawn by its envelope


def reconstructions(
    path: Path,
    originals: np.ndarray,
    rebuilt: np.ndarray,
    kind: Kind,
    corrupted: np.ndarray | None = None,
    peak: float | None = None,
) -> Path:
    """The first ten samples beside what the autoencoder makes of them; arrays (n, *shape of a sample), n >= 1.

    Images (n, C, H, W) stand in rows: original, what the encoder saw (where `corrupted` is given), reconstruction, all
    in the originals' scale of grey or colour. Vectors (n, D) and signals (n, C, T) are drawn over each other. The errors are
    of these samples in the units they are given in; with `peak`, the largest possible difference of two values, also the
    peak signal-to-noise ratio 10 log10(peak^2 / mse) in dB.
    """
    layers = {"original": originals, "corrupted": corrupted, "reconstruction": rebuilt}
    layers = {name: np.asarray(x[:MAX_COLUMNS], float) for name, x in layers.items() if x is not None}
    if len({x.shape for x in layers.values()}) > 1 or not len(layers["original"]):
        raise ValueError(f"reconstructions needs samples of one shape, got {[x.shape for x in layers.values()]}")
    title = f"Reconstructions of {counted(len(layers['original']), 'sample')}"
    draw = draw_images if kind == "image" else draw_profiles
    return draw(path, layers, kind, title, _errors(layers, peak), ())


def _errors(layers: Layers, peak: float | None) -> str:
    """How far the reconstruction is from the original, and how far the corrupted sample was."""
    errors = {name: np.mean((layers["original"] - x) ** 2) for name, x in layers.items() if name != "original"}
    shown = {name: f"{error:.3g}" if error < 1_000 else f"{error:,.0f}" for name, error in errors.items()}
    before = f" (corrupted: {shown['corrupted']})" if "corrupted" in errors else ""
    noise = ""
    if peak:
        with np.errstate(divide="ignore"):
            ratios = {name: 10 * np.log10(peak**2 / error) for name, error in errors.items()}
        noise = f"PSNR {ratios['reconstruction']:.1f} dB" + (f" (corrupted: {ratios['corrupted']:.1f} dB)" if before else "")
    return joined(f"mean squared error {shown['reconstruction']} a value, in stored units{before}", noise)


def sample_grid(path: Path, x: np.ndarray, titles: Sequence[str], kind: Kind) -> Path:
    """Up to 40 samples (n, *shape of a sample) from the front of `x`, each under its title: its label, mostly."""
    if len(x) != len(titles) or not len(x):
        raise ValueError(f"sample_grid needs samples and a title for each, got {len(x)} and {len(titles)}")
    shown = np.asarray(x[:MAX_SAMPLES], float)
    title = (f"{MAX_SAMPLES} of " if len(x) > MAX_SAMPLES else "") + counted(len(x), "sample")
    draw = draw_images if kind == "image" else draw_profiles
    return draw(path, {"sample": shown}, kind, title, "", [shortened(str(t), 14) for t in titles[:MAX_SAMPLES]])


def draw_images(path: Path, layers: Layers, _: Kind, title: str, detail: str, titles: Sequence[str]) -> Path:
    """Images (n, C, H, W): several layers a row each, one layer in a grid under `titles`."""
    images = np.concatenate(list(layers.values()))
    first = next(iter(layers.values()))
    channels, height, width = first.shape[1:]
    columns = min(len(first), MAX_COLUMNS)
    rows = -(-len(images) // columns)
    low, high = min(0.0, first.min()), first.max()
    if channels not in (1, 3):
        images, detail = images.mean(axis=1, keepdims=True), joined(detail, f"mean of the {channels} channels")
    pixels = np.clip((images - low) / ((high - low) or 1.0), 0, 1)
    pixels = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
    smoothing = "nearest" if max(height, width) <= 64 else "antialiased"
    cell = 0.9 * min(max(height / width, 0.4), 2.5) + (0.22 if titles else 0.04)
    with page(path, max(columns + (1.2 if len(layers) > 1 else 0.2), 3.8), rows * cell + 0.1, title, detail) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"anchor": "N", "xticks": [], "yticks": []})
        for axes, picture in zip(grid.flat, pixels, strict=False):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation=smoothing)
            axes.spines[:].set_color(FAINT)
        for axes in grid.flat[len(pixels) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, titles, strict=False):
            axes.set_title(name, fontsize=8, color=INK, pad=3)
        for axes, name in zip(grid[:, 0], layers if len(layers) > 1 else (), strict=False):
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    return path


def draw_profiles(
    path: Path, layers: Layers, kind: Kind, title: str, detail: str, titles: Sequence[str], signed: bool = False
) -> Path:
    """Vectors (n, D) and signals (n, C, T): a panel a sample, layers over each other, channels one below another.

    `signed` numbers keep their zero: it is drawn, and no feature is scaled to its own range.
    """
    if kind == "vector":
        layers = {name: x[:, None, :] for name, x in layers.items()}
        layers, note = (layers, "") if signed else comparable(layers)
        detail = joined(detail, note)
    first = next(iter(layers.values()))
    count, channels, length = first.shape
    if channels > MAX_CHANNELS:
        detail = joined(detail, f"the first {MAX_CHANNELS} of {channels} channels")
    columns = min(count, 8 if titles else 5)
    rows = -(-count // columns)
    lift = 1.1 * (np.ptp(first) or 1.0)
    draw = _draw_bars if kind == "vector" and length <= MAX_BARS else _draw_line
    roles = {name: name if len(layers) > 1 else "alone" for name in layers}
    handles: dict[str, Artist] = {}
    with page(path, max((1.6 if titles else 2.2) * columns, 6.4), 1.4 * rows + 0.3, title, detail) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[count:]:
            axes.set_axis_off()
        for index, axes in enumerate(grid.flat[:count]):
            style(axes)
            for c in range(min(channels, MAX_CHANNELS) if signed else 0):
                axes.axhline(-lift * c, color=FAINT, linewidth=0.8)
            for name, x in layers.items():
                lines = [draw(axes, x[index, c] - lift * c, roles[name]) for c in range(min(channels, MAX_CHANNELS))]
                handles[name] = lines[0]
            if channels > 1:
                axes.set_yticks([])
            if titles:
                axes.set_title(titles[index], loc="left", fontsize=8, color=INK, pad=3)
        figure.supxlabel("feature" if kind == "vector" else "time step", fontsize=8, color=INK)
        if len(layers) > 1:
            figure.legend(handles.values(), handles.keys(), loc="upper right", ncols=len(layers), **LEGEND)
    return path


def _draw_bars(axes: Axes, values: np.ndarray, role: str) -> Artist:
    places = np.arange(len(values))
    if role in ("original", "alone"):
        return axes.bar(places, values, width=0.8, color=FAINT if role == "original" else BLUE)
    mark, color = ("x", GREY) if role == "corrupted" else ("o", BLUE)
    return axes.plot(places, values, mark, color=color, markersize=3, markeredgewidth=0.8)[0]


def _draw_line(axes: Axes, values: np.ndarray, role: str) -> Artist:
    places = np.arange(len(values))
    if len(values) > MAX_LINE:  # the lowest and highest of each stretch: no peak is lost
        edges = np.linspace(0, len(values), MAX_LINE // 2, endpoint=False).astype(int)
        values = np.column_stack([np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)]).ravel()
        places = np.repeat(edges, 2)
    looks = {"original": ("-", FAINT, 2.4), "corrupted": (":", GREY, 0.7)}
    line, color, width = looks.get(role, ("-", BLUE, 1.0))
    return axes.plot(places, values, line, color=color, linewidth=width)[0]


def comparable(layers: Layers) -> tuple[Layers, str]:
    """Vectors (n, 1, D), scaled feature by feature where one feature's range would flatten the others, and a note."""
    first = next(iter(layers.values()))
    low, span = first.min(axis=0), np.ptp(first, axis=0)
    if not (span > 0).any() or span.max() <= 20 * np.median(span[span > 0]):
        return layers, ""
    span[span == 0] = 1.0
    return {name: (x - low) / span for name, x in layers.items()}, "each feature scaled to its range"
