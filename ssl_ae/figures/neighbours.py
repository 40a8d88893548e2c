"""Queries beside the samples whose codes are nearest to theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from ssl_ae.figures.page import BLUE, INK, WIDE, Kind, joined, page, shortened
from ssl_ae.figures.samples import MAX_BARS
from ssl_ae.figures.sheets import Grid, Range, _colors, _draw_images, _draw_profiles, _grid, _heights

MAX_QUERIES, MAX_NEIGHBOURS = 10, 10
CAPTION = 0.2  # inches below a cell for what is written there
SIZE = 7  # points


def neighbours(
    path: Path,
    queries: np.ndarray,
    found: np.ndarray,
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    kind: Kind,
    detail: str = "",
    limits: Range | None = None,
) -> Path:
    """A row a query: itself in a frame, then its nearest, nearest first; up to ten queries of ten neighbours.

    queries (Q, *shape of a sample), found (Q, n, *shape); `names` (Q) stand beside the rows, `captions` (Q, 1 + n) under the
    cells: what is known of the query, then of its neighbours.
    """
    if len(queries) != len(found) or not len(queries) or queries.shape[1:] != found.shape[2:]:
        raise ValueError(f"neighbours needs as many rows as queries, one at least; got {queries.shape} and {found.shape}")
    if [len(row) for row in captions] != [1 + found.shape[1]] * len(queries) or len(names) != len(queries):
        raise ValueError(f"{len(queries)} queries of {found.shape[1]} neighbours need a name each, and a caption a cell")
    shown = np.concatenate([queries[:, None], found], axis=1)[:MAX_QUERIES, : 1 + MAX_NEIGHBOURS].astype(float)
    more = f"the first {MAX_QUERIES} of {len(queries):,} queries" if len(queries) > MAX_QUERIES else ""
    names = [shortened(str(name), 14) for name in names[:MAX_QUERIES]]
    plain = _grid(shown, kind, gap=0.08, framed=(0,))
    step = plain.tall + CAPTION
    grid = Grid(plain.wide, plain.tall, plain.left, CAPTION - np.arange(1, len(shown) + 1) * step)
    if kind == "image":
        drawn, note = _colors(shown, limits)
    else:
        drawn, zero, note = _heights(shown, kind)
    width, height = grid.size
    height += CAPTION
    beside = max(WIDE * 8 * len(name) for name in names) + 0.1
    with page(path, width + beside + 0.4, height + 0.2, "Nearest neighbours by code", joined(detail, more, note)) as figure:
        axes = figure.add_subplot(anchor="NW")
        if kind == "image":
            _draw_images(axes, drawn, grid, seamless=False)
        else:
            _draw_profiles(axes, drawn, grid, zero if kind == "vector" and shown.shape[-1] <= MAX_BARS else None)
        room = max(3, int(grid.wide / (WIDE * SIZE)))
        for row, bottom in enumerate(grid.bottom):
            axes.add_patch(Rectangle((0, bottom), grid.wide, grid.tall, fill=False, edgecolor=BLUE, linewidth=2))
            for left, caption in zip(grid.left, captions[row], strict=False):
                place = {"ha": "center", "va": "top", "fontsize": SIZE, "color": INK}
                axes.text(left + grid.wide / 2, bottom - 0.03, shortened(caption, room), **place)
        axes.set(aspect="equal", xlim=(-0.03, width + 0.03), ylim=(-height - 0.03, 0.03), xticks=[])
        axes.set_yticks(grid.bottom + grid.tall / 2, names)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK, pad=2)
        axes.spines[:].set_visible(False)
    return path
