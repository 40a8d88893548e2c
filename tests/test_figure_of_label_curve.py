"""The figure of a label curve: which lines there are, what tells controls from methods, and what the axes count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ssl_ae import figures

pytestmark = pytest.mark.usefixtures("rendered")
METHODS = {"sequential": {10: (0.31, 0.02, 7), 300: (0.05, 0.01, 7)}, "joint-alpha0.1": {10: (0.2, np.nan, 1)}}
CONTROLS = {"labels-only": {10: (0.5, 0.03, 7), 300: (0.02, 0.004, 7)}}


def test_a_line_a_method_dashed_for_controls(tmp_path: Path, drawn: list[Figure]) -> None:
    path = figures.label_curve(tmp_path / "curve.png", METHODS, CONTROLS, "error", "Label curve of tiny", "144 rows of val")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert all(300 <= side <= 2_000 for side in picture.size)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sequential", "joint-alpha0.1", "labels-only"]
    words = " ".join(text.get_text() for text in drawn[0].texts)
    assert "Label curve of tiny 144 rows of val; mean ± deviation over 7 draws of the labels; dashed: controls" in words
    lines = {bars.get_label(): bars for bars in axes.containers}
    means, _, (bars,) = lines["sequential"].lines
    np.testing.assert_allclose(means.get_ydata(), [31.0, 5.0])  # in %
    np.testing.assert_allclose(means.get_xdata(), [10, 300], rtol=0.05)  # side by side
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((29.0, 33.0))
    assert lines["sequential"].lines[0].get_linestyle() == "-"
    assert lines["labels-only"].lines[0].get_linestyle() == "--"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "300"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")  # from 2 to 50 %


def test_figures_that_are_no_shares_and_close_together(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.label_curve(tmp_path / "curve.png", {"sequential": {20: (1.5, 0.1, 2), 50: (1.2, 0.1, 2)}}, {}, "rmse", "Label curve")
    (axes,) = drawn[0].axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("rmse", "linear")
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(), [1.5, 1.2])


def test_no_point_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point"):
        figures.label_curve(tmp_path / "curve.png", {"sequential": {}}, {}, "error", "Label curve")
    assert not list(tmp_path.iterdir())


def test_a_deviation_larger_than_its_mean_keeps_the_logarithmic_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    """Its bar leaves the picture below: it would end where there is no such error."""
    methods = {"recipe": {10: (0.03, 0.034, 10), 300: (0.01, 0.001, 10)}}
    figures.label_curve(tmp_path / "curve.png", methods, CONTROLS, "error", "Label curve")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] == pytest.approx(0.5)  # half the least mean, in %
    figures.label_curve(tmp_path / "curve.png", METHODS, CONTROLS, "error", "Label curve")
    assert drawn[1].axes[0].get_ylim()[0] > 1.0  # every bar ends above that: the axis is as matplotlib has it
