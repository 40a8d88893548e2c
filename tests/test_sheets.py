"""Sheets of decoded codes: which sample stands where, what is written along the sides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ssl_ae import figures
from ssl_ae.figures import sheets

pytestmark = pytest.mark.usefixtures("rendered")
SHAPES = {"image": (1, 7, 5), "vector": (13,), "signal": (2, 97)}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def levels(*cells: int) -> np.ndarray:
    """Images (*cells, 1, 7, 5), each of one grey: its number over their count."""
    count = int(np.prod(cells))
    return (np.arange(count) / count).reshape(*cells, 1, 1, 1) * np.ones((1, 7, 5))


def assert_picture(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(200 <= side <= 2_600 for side in picture.size)


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def side(axes: Axes, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{which}ticklabels")()]


def greys(axes: Axes) -> dict[tuple[int, int], float]:
    """{(row, column): grey} of the images of a sheet, by where they lie."""
    boxes = [(image.get_extent(), float(image.get_array().ravel()[0])) for image in axes.images]
    lefts, tops = sorted({box[0] for box, _ in boxes}), sorted({box[3] for box, _ in boxes}, reverse=True)
    return {(tops.index(box[3]), lefts.index(box[0])): grey for box, grey in boxes}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 64, 100])
def test_a_sheet_of_any_kind_and_count(tmp_path: Path, drawn: list[Figure], kind: str, count: int) -> None:
    assert_picture(figures.sample_sheet(tmp_path / "s.png", numbers(count, *SHAPES[kind]), kind, "Samples", "of the prior"))
    assert "Samples" in words(drawn[0])
    assert "of the prior" in words(drawn[0])
    assert len(drawn[0].axes) == 1


def test_samples_stand_in_the_order_they_come_and_empty_places_stay_empty(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.sample_sheet(tmp_path / "s.png", levels(7), "image", "Samples", limits=(0, 1))
    found = greys(drawn[0].axes[0])
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]  # 4 columns leave one place of 8 empty, 3 would leave two
    assert {place: pytest.approx(number / 7, abs=1e-6) for number, place in enumerate(places)} == found


def test_more_than_a_hundred_are_said(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.sample_sheet(tmp_path / "s.png", levels(1_237), "image", "Samples")
    assert "the first 100 of 1,237" in words(drawn[0])
    assert len(drawn[0].axes[0].images) == 100


PLANE = np.array([-2.0, 0.0, 2.0]), np.array([1.0, -1.0])


def test_the_plane_is_a_map(tmp_path: Path, drawn: list[Figure]) -> None:
    """z1 grows to the right and z2 upwards: row 0 is the top."""
    path = figures.latent_plane(tmp_path / "p.png", levels(2, 3), "image", *PLANE, "Plane", limits=(0, 1))
    assert_picture(path)
    (axes,) = drawn[0].axes
    expected = {(row, column): pytest.approx((3 * row + column) / 6, abs=1e-6) for row in range(2) for column in range(3)}
    assert expected == greys(axes)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z1", "z2")
    assert side(axes, "x") == ["−2.00", "0.00", "2.00"]
    assert side(axes, "y") == ["1.00", "−1.00"]
    assert axes.get_yticks()[0] > axes.get_yticks()[1]


def test_a_plane_of_larger_images_is_seamless(tmp_path: Path, drawn: list[Figure]) -> None:
    x = levels(2, 3).repeat(4, axis=-1).repeat(3, axis=-2)  # 21 x 20 pixels
    figures.latent_plane(tmp_path / "p.png", x, "image", *PLANE, "Plane", limits=(0, 1))
    (mosaic,) = drawn[0].axes[0].images
    pixels = np.asarray(mosaic.get_array())[..., 0]
    assert pixels.shape == (2 * 21, 3 * 20)
    assert pixels[::21, ::20].ravel().tolist() == pytest.approx([number / 6 for number in range(6)], abs=1e-6)


@pytest.mark.parametrize(("count", "named"), [(12, 12), (13, 7), (20, 10), (30, 10)])
def test_a_long_side_names_some_evenly(count: int, named: int) -> None:
    values = np.arange(count, dtype=float)
    found = sheets._ticks(values, "z1")
    assert len(found.names) == named
    assert len(set(np.diff(found.places))) == 1
    assert [float(name) for name in found.names] == values[list(found.places)].tolist()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_traversal_names_samples_and_values(tmp_path: Path, drawn: list[Figure], kind: str) -> None:
    values = figures.numbered(np.linspace(-3, 3, 5), "z2, in standard deviations")
    samples = figures.Side(["val-1", "a-key-that-goes-on-and-on-until-00000017", "val-3"])
    path = figures.latent_traversal(tmp_path / "t.png", numbers(3, 5, *SHAPES[kind]), kind, values, samples, "Dimension 2")
    assert_picture(path)
    (axes,) = drawn[0].axes
    assert side(axes, "x") == ["−3", "−1.5", "0", "1.5", "3"]
    assert side(axes, "y") == ["val-1", "…n-and-on-until-00000017", "val-3"]
    assert axes.get_xlabel() == "z2, in standard deviations"


def test_rows_and_columns_of_a_traversal_are_not_swapped(tmp_path: Path, drawn: list[Figure]) -> None:
    values, samples = figures.numbered(np.arange(5.0), "z1"), figures.Side(["a", "b", "c"])
    figures.latent_traversal(tmp_path / "t.png", levels(3, 5), "image", values, samples, "T", limits=(0, 1))
    expected = {(row, column): pytest.approx((5 * row + column) / 15, abs=1e-6) for row in range(3) for column in range(5)}
    assert expected == greys(drawn[0].axes[0])


@pytest.mark.parametrize("kind", SHAPES)
def test_an_interpolation_has_the_originals_at_its_ends(tmp_path: Path, drawn: list[Figure], kind: str) -> None:
    x, ends = numbers(5, *SHAPES[kind]), numbers(2, *SHAPES[kind]) + 1
    assert_picture(figures.latent_interpolation(tmp_path / "i.png", x, ends, ["one", "two"], kind, "A way"))
    (axes,) = drawn[0].axes
    assert side(axes, "x") == ["one\noriginal", "0", "0.25", "0.5", "0.75", "1", "two\noriginal"]
    frames = [patch for patch in axes.patches if patch.get_linewidth() == 2]
    assert len(frames) == 2


def test_the_ends_are_the_originals(tmp_path: Path, drawn: list[Figure]) -> None:
    x, ends = levels(3), np.stack([np.full((1, 7, 5), 0.9), np.full((1, 7, 5), 0.8)])
    figures.latent_interpolation(tmp_path / "i.png", x, ends, ["a", "b"], "image", "A way", limits=(0, 1))
    found = greys(drawn[0].axes[0])
    assert [found[0, column] for column in range(5)] == pytest.approx([0.9, 0, 1 / 3, 2 / 3, 0.8], abs=1e-6)


def test_values_outside_the_limits_are_clipped(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.array([-4.0, 8.0, 20.0])[:, None, None, None] * np.ones((1, 7, 5))
    figures.sample_sheet(tmp_path / "s.png", x, "image", "S", limits=(0, 16))
    assert sorted(greys(drawn[0].axes[0]).values()) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_any_channels(tmp_path: Path, drawn: list[Figure], channels: int) -> None:
    assert_picture(figures.sample_sheet(tmp_path / "s.png", numbers(11, channels, 7, 5), "image", "S"))
    assert ("mean of the 2 channels" in words(drawn[0])) == (channels == 2)


def lines(figure: Figure) -> list[np.ndarray]:
    """[(points, 2)] of every bar or line."""
    return figure.axes[0].collections[1].get_segments()


def test_bars_start_at_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.array([[-1.0, 0.0, 3.0]])
    figures.sample_sheet(tmp_path / "s.png", x, "vector", "S")
    starts, ends = np.array(lines(drawn[0]))[..., 1].T
    assert np.ptp(starts) == 0
    assert (ends - starts) / (ends - starts).max() == pytest.approx(x[0] / 3, abs=1e-9)
    assert "all from -1 to 3" in words(drawn[0])


def test_a_long_line_keeps_its_highest_peak(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.zeros((1, 1, 100_003))
    x[0, 0, 77_777] = 5.0
    figures.sample_sheet(tmp_path / "s.png", x, "signal", "S")
    (line,) = lines(drawn[0])
    assert len(line) <= sheets.MAX_POINTS
    assert (line[:, 1] == line[:, 1].max()).sum() == 1
    assert line[:, 1].max() > line[:, 1].min()


def test_many_channels_are_said(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.sample_sheet(tmp_path / "s.png", numbers(3, 11, 97), "signal", "S")
    assert "the first 4 of 11 channels" in words(drawn[0])
    assert len(lines(drawn[0])) == 3 * 4


def test_features_of_other_magnitudes_are_scaled_each(tmp_path: Path, drawn: list[Figure]) -> None:
    x = numbers(6, 3) * [1, 2, 5000]
    figures.sample_sheet(tmp_path / "s.png", x, "vector", "S")
    assert "each feature scaled to its range" in words(drawn[0])


def test_samples_that_are_all_alike(tmp_path: Path) -> None:
    for kind, shape in SHAPES.items():
        figures.sample_sheet(tmp_path / f"{kind}.png", np.zeros((3, *shape)), kind, "S")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (figures.sample_sheet, [np.zeros((0, 1, 7, 5)), "image", "S"]),
        (figures.sample_sheet, [np.zeros((3, 7, 5)), "image", "S"]),
        (figures.latent_plane, [levels(2, 3), "image", np.arange(2), np.arange(3), "P"]),
        (figures.latent_traversal, [levels(2, 3), "image", figures.Side(["a"] * 2), figures.Side(["b"] * 3), "T"]),
        (figures.latent_interpolation, [levels(1), levels(2), ["a", "b"], "image", "I"]),
        (figures.latent_interpolation, [levels(3), levels(3), ["a", "b", "c"], "image", "I"]),
    ],
)
def test_wrong_arrays_are_refused_and_leave_no_file(tmp_path: Path, function, arguments) -> None:
    with pytest.raises(ValueError, match="got"):
        function(tmp_path / "x.png", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_same_codes_give_the_same_bytes(tmp_path: Path) -> None:
    x = numbers(5, 1, 7, 5)
    files = [figures.sample_sheet(tmp_path / f"{name}.png", x, "image", "S").read_bytes() for name in "ab"]
    assert files[0] == files[1]
