"""How training went: every metric over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from ssl_ae.figures.page import BLUE, INK, LEGEND, PAPER, SIDES, page, style


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
    with page(path, width, height, "Learning curves", "last value in the legend") as figure:
        for place, (panel, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_curves(axes, panel, lines)
            if place > len(panels) - columns:
                axes.set_xlabel("step", fontsize=8, color=INK)
    return path


def _draw_curves(axes: Axes, name: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    style(axes)
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
