"""Pictures for a run's folder and for MLflow: plain numpy arrays in, one PNG out. The only owner of matplotlib.

Importing matplotlib and scikit-learn takes a second, so stages import this module where they draw, never at the top.
Every function writes its file whole or not at all and returns its path. Figures are made without pyplot, hence without
global state: two threads may draw at once. Wrong arrays are a caller's mistake and raise ValueError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from sklearn import metrics
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from ssl_ae import files

Kind = Literal["image", "vector", "signal"]
Layers = dict[str, np.ndarray]

DPI = 130
MAX_COLUMNS = 10  # samples of a reconstruction figure
MAX_SAMPLES = 40  # samples of a grid
MAX_POINTS = 5_000  # rows of a latent map
MAX_EMBEDDED = 1_500  # rows of one that t-SNE has to arrange: about 2 s
MAX_NAMED = 20  # classes with a colour and a line in the legend
MAX_CELL_TEXT = 30  # classes of a confusion matrix with numbers in its cells
MAX_CHANNELS = 4  # channels of a signal
MAX_BARS = 40  # features of a vector drawn as bars, more as a line
MAX_LINE = 4_000  # values of a line before it is drawn by its envelope

INK, GREY, FAINT, PAPER = "#333333", "#8a8a8a", "#d0d0d0", "#f3f3f3"
BLUE, ORANGE, GREEN = (colormaps["tab10"](index) for index in (0, 1, 2))
SIDES = {"train": BLUE, "val": ORANGE, "test": GREEN}
# The greys of tab10 and tab20 mean "unlabelled" here, so dark and indigo stand in for them.
CLASS_COLORS = tuple(
    [colormaps[name](place) if place not in greys else greys[place] for place in range(colormaps[name].N)]
    for name, greys in (("tab10", {7: "#1a1a1a"}), ("tab20", {14: "#1a1a1a", 15: "#6b6ecf"}))
)
LEGEND = {"frameon": False, "fontsize": 8, "labelcolor": INK}


def learning_curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Path:
    """One panel a metric: `train/NAME`, `val/NAME` and `test/NAME` share the panel NAME, any other name has its own.

    `series` maps a name to its (steps, values), equally long. Values that are not finite leave a gap.
    """
    if not series:
        raise ValueError("learning_curves was given no series")
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, (steps, values) in series.items():
        side, _, metric = name.partition("/")
        panel, line = (metric, side) if metric and side in SIDES else (name, "")
        panels.setdefault(panel, {})[line] = (np.asarray(steps, float), np.asarray(values, float))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = max(4.0 * columns, 6.0), 2.6 * rows
    with _page(path, width, height, "Learning curves", "last value in the legend") as figure:
        for place, (panel, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_curves(axes, panel, lines)
            if place > len(panels) - columns:
                axes.set_xlabel("step", fontsize=8, color=INK)
    return path


def reconstructions(
    path: Path, originals: np.ndarray, rebuilt: np.ndarray, kind: Kind, corrupted: np.ndarray | None = None
) -> Path:
    """The first ten samples beside what the autoencoder makes of them; arrays (n, *shape of a sample), n >= 1.

    Images (n, C, H, W) stand in rows: original, what the encoder saw (where `corrupted` is given), reconstruction, all
    in the originals' scale of grey or colour. Vectors (n, D) and signals (n, C, T) are drawn over each other.
    """
    layers = {"original": originals, "corrupted": corrupted, "reconstruction": rebuilt}
    layers = {name: np.asarray(x[:MAX_COLUMNS], float) for name, x in layers.items() if x is not None}
    if len({x.shape for x in layers.values()}) > 1 or not len(layers["original"]):
        raise ValueError(f"reconstructions needs samples of one shape, got {[x.shape for x in layers.values()]}")
    error = np.mean((layers["original"] - layers["reconstruction"]) ** 2)
    title = f"Reconstructions of {_counted(len(layers['original']), 'sample')}"
    draw = _draw_images if kind == "image" else _draw_profiles
    return draw(path, layers, kind, title, f"mean squared error {error:.3g} a value", ())


def sample_grid(path: Path, x: np.ndarray, titles: Sequence[str], kind: Kind) -> Path:
    """Up to 40 samples (n, *shape of a sample) from the front of `x`, each under its title: its label, mostly."""
    if len(x) != len(titles) or not len(x):
        raise ValueError(f"sample_grid needs samples and a title for each, got {len(x)} and {len(titles)}")
    shown = np.asarray(x[:MAX_SAMPLES], float)
    title = (f"{MAX_SAMPLES} of " if len(x) > MAX_SAMPLES else "") + _counted(len(x), "sample")
    draw = _draw_images if kind == "image" else _draw_profiles
    return draw(path, {"sample": shown}, kind, title, "", [_shortened(str(t), 14) for t in titles[:MAX_SAMPLES]])


def confusion_matrix(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> Path:
    """How many rows of each true class were given which class; (n,) each, in 0..C-1, a label of -1 is unknown.

    Colour is the share of the true class. Up to 30 classes, cells that hold rows say how many and which percentage.
    """
    known = np.asarray(labels) >= 0
    truth, guess = np.asarray(labels)[known].astype(int), np.asarray(predictions)[known].astype(int)
    classes = len(class_names)
    if not len(truth) or max(truth.max(), guess.max()) >= classes or guess.min() < 0:
        raise ValueError(f"confusion_matrix needs labelled rows and classes from 0 to {classes - 1}")
    indices = np.arange(max(classes, 2))  # scikit-learn warns where it counts a single class
    counts = metrics.confusion_matrix(truth, guess, labels=indices)[:classes, :classes]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    written = classes <= MAX_CELL_TEXT
    side = max(classes * (0.62 if classes <= 12 else 0.46), 2.6) if written else 8.0
    title = f"Confusion matrix: {np.mean(truth == guess):.1%} of {_counted(len(truth), 'row')} correct"
    detail = "rows, and their share of the true class" if written else "colour: share of the true class"
    left_out = f"{np.sum(~known):,} unlabelled left out" if not known.all() else ""
    with _page(path, max(side + 1.6, 5.0), side + 0.9, title, _joined(detail, left_out)) as figure:
        axes = figure.add_subplot(anchor="NW")
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        _style(axes)
        _name_cells(axes, [_shortened(str(name), 16) for name in class_names], side / classes)
        if written:
            _write_cells(axes, counts, shares)
        else:
            _add_scale(axes, image, format=lambda share, _: f"{share:.0%}")
    return path


def latent_map(path: Path, latents: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] = ()) -> Path:
    """The latents (n, K) in the plane: a histogram for K = 1, as they are for K = 2, else by t-SNE (van der Maaten & Hinton 2008).

    Whole-number labels (n,) are classes, -1 unlabelled (grey). Floating labels (n,) or (n, T) are regression targets, NaN
    unlabelled: the first target, `class_names[0]`, is the colour, and the height where K = 1. More than 5,000 rows (1,500 for
    t-SNE) are drawn from with a fixed seed; labelled rows fill at least half of the places while they last, for they are few.
    """
    latents = np.asarray(latents)
    labels = np.full(len(latents), -1) if labels is None else np.asarray(labels)
    regression = np.issubdtype(labels.dtype, np.floating)
    labels = labels.reshape(len(latents), -1)[:, 0]
    known = np.isfinite(labels) if regression else labels >= 0
    chosen = _chosen_rows(known, MAX_POINTS if latents.shape[1] <= 2 else MAX_EMBEDDED)
    labels, shown = labels[chosen], known[chosen]
    points, axis_names = _plane(latents[chosen])
    target = str(class_names[0]) if len(class_names) else "target"
    if regression and len(axis_names) == 1:
        points, axis_names = np.column_stack([points, labels]), [*axis_names, target]
    title = f"Latent space, K = {latents.shape[1]}: {_counted(len(latents), 'row')}"
    if len(chosen) < len(latents):
        title = f"Latent space, K = {latents.shape[1]}: {len(chosen):,} of {len(latents):,} rows, drawn at random"
    detail = f"coloured by {target if regression else 'class'}" if known.any() else "no labels"
    if known.any() and not known.all():
        detail = _joined(detail, f"{shown.sum():,} of {known.sum():,} labelled rows shown")
    with _page(path, 7.6, 5.8, title, detail) as figure:
        axes = figure.add_subplot()
        _style(axes)
        axes.set_xlabel(axis_names[0], fontsize=9, color=INK)
        axes.set_ylabel("rows" if len(axis_names) == 1 else axis_names[1], fontsize=9, color=INK)
        if regression:
            _draw_values(axes, points, labels, shown, target)
        else:
            _draw_classes(axes, points, labels.astype(int), shown, class_names)
    return path


@contextlib.contextmanager
def _page(path: Path, width: float, height: float, title: str, detail: str = "") -> Iterator[Figure]:
    """A figure of `height` inches under its title that becomes a PNG when the block succeeds, and nothing otherwise."""
    top = 0.65 if detail else 0.42
    height += top
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - top / height), w_pad=0.08, h_pad=0.06)
    figure.text(0.12 / width, 1 - 0.12 / height, title, va="top", fontsize=12, color=INK)
    figure.text(0.12 / width, 1 - 0.37 / height, detail, va="top", fontsize=9, color=GREY)
    yield figure
    with files.whole_file(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})  # the same picture, the same bytes


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8, labelcolor=INK, color=FAINT)


def _add_scale(axes: Axes, colored: ScalarMappable, **options: object) -> None:
    bar = axes.figure.colorbar(colored, ax=axes, shrink=0.7, aspect=25, pad=0.02, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    bar.ax.yaxis.label.set(fontsize=9, color=INK)


def _draw_curves(axes: Axes, name: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    _style(axes)
    axes.set_title(name, loc="left", fontsize=9, color=INK)
    axes.grid(axis="y", color=PAPER)
    axes.set_axisbelow(True)
    for side, (steps, values) in lines.items():
        finite = values[np.isfinite(values)]
        label = f"{side}  {finite[-1]:.4g}" if len(finite) else f"{side}  never finite"
        look = {"color": SIDES.get(side, BLUE), "linewidth": 1.4, "markersize": 3, "label": label.strip()}
        axes.plot(steps, values, "o-" if len(values) <= 12 else "-", **look)  # a line through one point is invisible
    every = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
    if len(every) and every.min() > 0 and every.max() > 1_000 * every.min():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1) if len(every) else NullLocator()
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(**LEGEND)


def _draw_images(path: Path, layers: Layers, _: Kind, title: str, detail: str, titles: Sequence[str]) -> Path:
    """Images (n, C, H, W): several layers a row each, one layer in a grid under `titles`."""
    images = np.concatenate(list(layers.values()))
    first = next(iter(layers.values()))
    channels, height, width = first.shape[1:]
    columns = min(len(first), MAX_COLUMNS)
    rows = -(-len(images) // columns)
    low, high = min(0.0, first.min()), first.max()
    if channels not in (1, 3):
        images, detail = images.mean(axis=1, keepdims=True), _joined(detail, f"mean of the {channels} channels")
    pixels = np.clip((images - low) / ((high - low) or 1.0), 0, 1)
    pixels = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
    smoothing = "nearest" if max(height, width) <= 64 else "antialiased"
    cell = 0.9 * min(max(height / width, 0.4), 2.5) + (0.22 if titles else 0.04)
    with _page(path, max(columns + (1.2 if len(layers) > 1 else 0.2), 3.8), rows * cell + 0.1, title, detail) as figure:
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


def _draw_profiles(path: Path, layers: Layers, kind: Kind, title: str, detail: str, titles: Sequence[str]) -> Path:
    """Vectors (n, D) and signals (n, C, T): a panel a sample, layers over each other, channels one below another."""
    if kind == "vector":
        layers, note = _comparable({name: x[:, None, :] for name, x in layers.items()})
        detail = _joined(detail, note)
    first = next(iter(layers.values()))
    count, channels, length = first.shape
    if channels > MAX_CHANNELS:
        detail = _joined(detail, f"the first {MAX_CHANNELS} of {channels} channels")
    columns = min(count, 8 if titles else 5)
    rows = -(-count // columns)
    lift = 1.1 * (np.ptp(first) or 1.0)
    draw = _draw_bars if kind == "vector" and length <= MAX_BARS else _draw_line
    roles = {name: name if len(layers) > 1 else "alone" for name in layers}
    handles: dict[str, Artist] = {}
    with _page(path, max((1.6 if titles else 2.2) * columns, 6.4), 1.4 * rows + 0.3, title, detail) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[count:]:
            axes.set_axis_off()
        for index, axes in enumerate(grid.flat[:count]):
            _style(axes)
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


def _comparable(layers: Layers) -> tuple[Layers, str]:
    """Vectors (n, 1, D), scaled feature by feature where one feature's range would flatten the others, and a note."""
    first = next(iter(layers.values()))
    low, span = first.min(axis=0), np.ptp(first, axis=0)
    if not (span > 0).any() or span.max() <= 20 * np.median(span[span > 0]):
        return layers, ""
    span[span == 0] = 1.0
    return {name: (x - low) / span for name, x in layers.items()}, "each feature scaled to its range"


def _name_cells(axes: Axes, names: list[str], cell: float) -> None:
    """Class names along both sides of a confusion matrix whose cells measure `cell` inches."""
    every = -(-len(names) // 50)  # more names than this would run into each other
    places, size = range(0, len(names), every), 8 if len(names) <= MAX_CELL_TEXT else 6
    upright = max(map(len, names)) * 0.009 * size > cell * every
    axes.set_xticks(places, names[::every], rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(places, names[::every], fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)


def _write_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    size = 8 if len(counts) <= 12 else 5.5
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        text = f"{counts[row, column]:,}\n" + (f"{share:.0%}" if share >= 0.005 else "<1%")
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if share > 0.55 else INK)


def _chosen_rows(known: np.ndarray, limit: int) -> np.ndarray:
    """Positions of at most `limit` rows, unlabelled ones first, else in an order that hides no class behind another."""
    draw = np.random.default_rng(0)
    labelled, unlabelled = draw.permutation(np.flatnonzero(known)), draw.permutation(np.flatnonzero(~known))
    places = min(len(known), limit)
    share = round(places * len(labelled) / max(len(known), 1))
    count = min(len(labelled), max(share, places // 2))
    return np.concatenate([unlabelled[: places - count], labelled[:count]])


def _plane(z: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(n, K) -> (n, min(K, 2)) and the name of each axis."""
    if z.shape[1] <= 2:
        return z, [f"z{index}" for index in range(1, z.shape[1] + 1)]
    names = ["t-SNE 1", "t-SNE 2"]
    spread = float(z.std())
    if len(z) < 4 or spread == 0.0:  # too few to have neighbours, or a collapsed code: nothing to arrange
        return z[:, :2], ["z1", "z2"]
    with threadpool_limits(1):  # on cores that others use too, its threads wait for each other more than they work
        tsne = TSNE(init="random", perplexity=min(30, (len(z) - 1) / 3), max_iter=500, random_state=0)
        return tsne.fit_transform(z / spread), names


def _draw_classes(axes: Axes, points: np.ndarray, labels: np.ndarray, known: np.ndarray, names: Sequence[str]) -> None:
    present, counts = np.unique(labels[known], return_counts=True)
    named = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_NAMED]])  # the most frequent ones
    palette = CLASS_COLORS[len(named) > 10]
    titles = [_shortened(str(names[label]), 24) if label < len(names) else f"class {label}" for label in named]
    groups = [(titles[place], palette[place], labels == label) for place, label in enumerate(named)]
    if len(named) < len(present):
        groups.append((f"{len(present) - len(named)} other classes", GREY, known & ~np.isin(labels, named)))
    if not known.all():
        groups.append(("unlabelled", FAINT, ~known))
    if points.shape[1] == 1:
        bins = np.histogram_bin_edges(points, bins=40)
        for _, color, rows in reversed(groups):
            face = to_rgba(color, 0.15)
            axes.hist(points[rows, 0], bins, histtype="stepfilled", facecolor=face, edgecolor=color)
    else:
        colors = np.zeros((len(points), 4))
        for _, color, rows in groups:
            colors[rows] = to_rgba(color)
        sizes = np.where(known, _dot(known.sum()), _dot(len(points)))
        axes.scatter(points[:, 0], points[:, 1], s=sizes, c=colors, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
    handles = [Line2D([], [], linestyle="", marker="o", markersize=5, color=color) for _, color, _ in groups]
    axes.legend(handles, [name for name, _, _ in groups], loc="upper left", bbox_to_anchor=(1, 1), **LEGEND)


def _draw_values(axes: Axes, points: np.ndarray, values: np.ndarray, known: np.ndarray, name: str) -> None:
    axes.scatter(*points[~known].T, s=_dot(len(points)), color=FAINT, linewidths=0)
    dots = axes.scatter(*points[known].T, s=_dot(known.sum()), c=values[known], cmap="viridis", linewidths=0)
    _add_scale(axes, dots, label=name)


def _dot(count: int) -> float:
    """Area in square points: few dots must be seen, many must not cover each other."""
    return float(np.clip(20_000 / max(count, 1), 7, 40))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
