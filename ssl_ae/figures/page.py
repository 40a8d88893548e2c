"""The page every figure is drawn on: its size, colours and words, and a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.text import Text

from ssl_ae import files

Kind = Literal["image", "vector", "signal"]
Layers = dict[str, np.ndarray]
DPI = 130
WIDE = 0.0075  # inches a letter is wide for each point of its size, on average and a little more
INK, GREY, FAINT, PAPER = "#333333", "#8a8a8a", "#d0d0d0", "#f3f3f3"
BLUE, ORANGE, GREEN = (colormaps["tab10"](index) for index in (0, 1, 2))
SIDES = {"train": BLUE, "val": ORANGE, "test": GREEN}
# The greys of tab10 and tab20 mean "unlabelled" here, so dark and indigo stand in for them.
CLASS_COLORS = tuple(
    [colormaps[name](place) if place not in greys else greys[place] for place in range(colormaps[name].N)]
    for name, greys in (("tab10", {7: "#1a1a1a"}), ("tab20", {14: "#1a1a1a", 15: "#6b6ecf"}))
)
LEGEND = {"frameon": False, "fontsize": 8, "labelcolor": INK}


@contextlib.contextmanager
def page(path: Path, width: float, height: float, title: str, detail: str = "") -> Iterator[Figure]:
    """A figure of `height` inches under its title that becomes a PNG when the block succeeds, and nothing otherwise.

    As wide as asked for, or as its words need.
    """
    width = max(width, 0.24 + WIDE * 12 * len(title), 0.24 + WIDE * 9 * len(detail))
    top = 0.65 if detail else 0.42
    height += top
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - top / height), w_pad=0.08, h_pad=0.06)
    figure.text(0.12 / width, 1 - 0.12 / height, title, va="top", fontsize=12, color=INK)
    figure.text(0.12 / width, 1 - 0.37 / height, detail, va="top", fontsize=9, color=GREY)
    yield figure
    _take_literally(figure)
    with files.whole_file(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})  # the same picture, the same bytes


def _take_literally(figure: Figure) -> None:
    """Names come from the data, and between two dollars matplotlib would read a formula. Only powers of ten are formulas here."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    powers = {text for axis in axes if axis.get_scale() == "log" for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        text.set_parse_math(text in powers)


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8, labelcolor=INK, color=FAINT)


def add_scale(axes: Axes, colored: ScalarMappable, **options: object) -> None:
    bar = axes.figure.colorbar(colored, ax=axes, shrink=0.7, aspect=25, pad=0.02, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    bar.ax.yaxis.label.set(fontsize=9, color=INK)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
