"""How good methods are by the number of labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ssl_ae.figures.page import CLASS_COLORS, FAINT, INK, LEGEND, PAPER, joined, page, style

Points = Mapping[int, tuple[float, float, int]]  # {labels: (mean, deviation or NaN, draws)}
MARKERS = "osD^vP*X"
WIDE_RANGE = 8.0  # ratio of the largest to the smallest mean above which the axis is logarithmic


def label_curve(
    path: Path, methods: Mapping[str, Points], controls: Mapping[str, Points], axis: str, title: str, detail: str = ""
) -> Path:
    """A line for each method, dashed for each control: means with bars of one deviation, over labels on a logarithmic axis.

    `axis` names the figure; that of `error` or `accuracy` is a share and shown in %.
    """
    lines = {name: points for name, points in (methods | controls).items() if points}
    if not lines:
        raise ValueError("label_curve was given no point")
    share = axis in ("error", "accuracy")
    draws = max(count for points in lines.values() for _, _, count in points.values())
    spread = f"mean ± deviation over {draws} draws of the labels" if draws > 1 else "one draw of the labels"
    note = joined(detail, spread, "dashed: controls" if controls else "")
    with page(path, 7.4, 4.2, title, note) as figure:
        axes = figure.add_subplot()
        style(axes)
        axes.set_axisbelow(True)
        for i, (name, points) in enumerate(lines.items()):
            place = (i - (len(lines) - 1) / 2) * 0.018  # side by side, so that bars do not hide one another
            _draw(axes, name, points, place, 100 if share else 1, i, name in controls)
        _scale(axes, lines, 100 if share else 1)
        axes.set_xlabel("labels, of all classes together", fontsize=9, color=INK)
        axes.set_ylabel(f"{axis}, %" if share else axis, fontsize=9, color=INK)
        axes.legend(**LEGEND, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.6, labelspacing=0.9)
    return path


def _draw(axes: Axes, name: str, points: Points, place: float, unit: float, number: int, control: bool) -> None:
    labels = np.array(sorted(points), float)
    mean = unit * np.array([points[int(count)][0] for count in labels])
    deviation = unit * np.array([points[int(count)][1] for count in labels])
    color = CLASS_COLORS[0][number % len(CLASS_COLORS[0])]
    axes.errorbar(
        labels * np.exp(place),
        mean,
        yerr=np.nan_to_num(deviation),
        label=name,
        color=color,
        linestyle=(0, (4, 2)) if control else "-",
        linewidth=1.3 if control else 2.0,
        elinewidth=1.0,
        marker=MARKERS[number % len(MARKERS)],
        markersize=4.5 if control else 5.5,
        markerfacecolor="white" if control else color,
        capsize=2,
        zorder=2 if control else 3,
    )


def _scale(axes: Axes, lines: Mapping[str, Points], unit: float) -> None:
    axes.set_xscale("log")
    labels = sorted({count for points in lines.values() for count in points})
    axes.set_xlim(labels[0] / 1.25, labels[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(labels))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    means = np.array([unit * mean for points in lines.values() for mean, _, _ in points.values()])
    lowest = min(unit * (mean - (0 if np.isnan(sd) else sd)) for points in lines.values() for mean, sd, _ in points.values())
    if means.min() > 0 and means.max() > WIDE_RANGE * means.min():
        axes.set_yscale("log", nonpositive="clip")
        if lowest < means.min() / 2:  # a deviation of about its mean makes a bar that falls for decades, or ends below 0
            axes.set_ylim(bottom=means.min() / 2)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=PAPER if axes.get_yscale() == "linear" else FAINT, linewidth=0.6)
