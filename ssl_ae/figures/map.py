"""The codes of many samples in the plane."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from ssl_ae.figures.page import CLASS_COLORS, FAINT, GREY, INK, LEGEND, add_scale, counted, joined, page, shortened, style

MAX_POINTS = 5_000  # rows of a latent map
MAX_EMBEDDED = 1_000  # rows of one that t-SNE has to arrange: about 1 s
MAX_NAMED = 20  # classes with a colour and a line in the legend


def latent_map(path: Path, latents: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] = ()) -> Path:
    """The latents (n, K) in the plane: a histogram for K = 1, as they are for K = 2, else by t-SNE (Maaten & Hinton 2008).

    Whole-number labels (n,) are classes, -1 unlabelled (grey). Floating labels (n,) or (n, T) are regression targets, NaN
    unlabelled: the first target, `class_names[0]`, is the colour, and the height where K = 1. More than 5,000 rows (1,000 for
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
    title = f"Latent space, K = {latents.shape[1]}: {counted(len(latents), 'row')}"
    if len(chosen) < len(latents):
        title = f"Latent space, K = {latents.shape[1]}: {len(chosen):,} of {len(latents):,} rows, drawn at random"
    detail = f"coloured by {target if regression else 'class'}" if known.any() else "no labels"
    if known.any() and not known.all():
        detail = joined(detail, f"{shown.sum():,} of {known.sum():,} labelled rows shown")
    with page(path, 7.6, 5.8, title, detail) as figure:
        axes = figure.add_subplot()
        style(axes)
        axes.set_xlabel(axis_names[0], fontsize=9, color=INK)
        axes.set_ylabel("rows" if len(axis_names) == 1 else axis_names[1], fontsize=9, color=INK)
        if regression:
            _draw_values(axes, points, labels, shown, target)
        else:
            _draw_classes(axes, points, labels.astype(int), shown, class_names)
    return path


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
    spread = float(z.std())
    if len(z) < 4 or spread == 0.0:  # too few to have neighbours, or a collapsed code: nothing to arrange
        return z[:, :2], ["z1", "z2"]
    return _arranged((z / spread).tobytes(), z.dtype.str, len(z)).copy(), ["t-SNE 1", "t-SNE 2"]


@functools.lru_cache(maxsize=1)
def _arranged(content: bytes, kind: str, rows: int) -> np.ndarray:
    """(rows, 2) by t-SNE of the numbers in `content`. Kept: extraction and a head on its latents show the same codes."""
    z = np.frombuffer(content, kind).reshape(rows, -1)
    with threadpool_limits(1):  # on cores that others use too, its threads wait for each other more than they work
        # a wider angle than 0.5 takes a quarter less time, and neighbours stay neighbours just as often
        tsne = TSNE(init="random", perplexity=min(30, (rows - 1) / 3), max_iter=500, angle=0.8, random_state=0)
        return tsne.fit_transform(z)


def _draw_classes(axes: Axes, points: np.ndarray, labels: np.ndarray, known: np.ndarray, names: Sequence[str]) -> None:
    present, counts = np.unique(labels[known], return_counts=True)
    named = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_NAMED]])  # the most frequent ones
    palette = CLASS_COLORS[len(named) > 10]
    titles = [shortened(str(names[label]), 24) if label < len(names) else f"class {label}" for label in named]
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
    add_scale(axes, dots, label=name)


def _dot(count: int) -> float:
    """Area in square points: few dots must be seen, many must not cover each other."""
    return float(np.clip(20_000 / max(count, 1), 7, 40))
