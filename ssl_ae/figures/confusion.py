"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from sklearn import metrics

from ssl_ae.figures.page import INK, add_scale, counted, joined, page, shortened, style

MAX_CELL_TEXT = 30  # classes of a confusion matrix with numbers in its cells


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
    title = f"Confusion matrix: {np.mean(truth == guess):.1%} of {counted(len(truth), 'row')} correct"
    detail = "rows, and their share of the true class" if written else "colour: share of the true class"
    left_out = f"{np.sum(~known):,} unlabelled left out" if not known.all() else ""
    with page(path, max(side + 1.6, 5.0), side + 0.9, title, joined(detail, left_out)) as figure:
        axes = figure.add_subplot(anchor="NW")
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        style(axes)
        _name_cells(axes, [shortened(str(name), 16) for name in class_names], side / classes)
        if written:
            _write_cells(axes, counts, shares)
        else:
            add_scale(axes, image, format=lambda share, _: f"{share:.0%}")
    return path


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
