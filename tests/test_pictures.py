"""What components show: the right numbers in the right colours, and words that say which part of them is seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ssl_ae import figures
from ssl_ae.pictures import Histogram, Lines, Tiles

pytestmark = pytest.mark.usefixtures("rendered")
WHITE, GREY = [1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def words(figure: Figure) -> str:
    """Title and detail line."""
    return "\n".join(text.get_text() for text in figure.texts)


def shown(figure: Figure) -> list[np.ndarray]:
    """The colours of each tile."""
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


# --- tiles


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 7, 5), (64, 1, 28, 28), (13, 2, 3, 11), (17, 3, 5, 5), (11, 5, 7, 5), (2, 1, 97, 3), (7, 1), (3, 41), (5, 2, 13)],
)
def test_tiles_of_any_shape_become_one_picture(tmp_path: Path, drawn: list[Figure], shape: tuple[int, ...], signed: bool) -> None:
    path = figures.draw(tmp_path / "filters.png", Tiles("filters", "Filters of the first layer", numbers(*shape), signed))
    assert [file.name for file in tmp_path.iterdir()] == ["filters.png"]
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(150 <= side <= 2_600 for side in picture.size)
    assert words(drawn[0]).startswith("Filters of the first layer\n")
    tiles = drawn[0].axes[0].images if len(shape) == 4 else [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert len(tiles) == shape[0]


def test_signed_tiles_have_their_zero_white_and_a_range_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    """Weights -2, 0, 1 and the same a thousand times smaller: the same colours; bluer below zero, redder above."""
    tile = torch.tensor([[-2.0, 0.0, 1.0]])
    figures.draw(tmp_path / "filters.png", Tiles("filters", "Filters", torch.stack([tile, tile / 1000])[:, None]))
    first, second = shown(drawn[0])
    np.testing.assert_allclose(first, second, atol=0.02)
    blue, white, red = first[0]
    np.testing.assert_allclose(white, WHITE, atol=0.01)  # one of 256 steps of the scale
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert white[1] > red[1] > blue[1]  # 1 of 2 is half way to the end of the scale, -2 is its end
    assert "each in its own range, from blue through white (zero) to red" in words(drawn[0])


def test_a_tile_of_zeros_is_white(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw(tmp_path / "filters.png", Tiles("filters", "Filters", torch.zeros(2, 1, 3, 3)))
    np.testing.assert_allclose(shown(drawn[0])[1][1, 1], WHITE, atol=0.01)


def test_kernels_of_three_channels_are_colours_around_grey(tmp_path: Path, drawn: list[Figure]) -> None:
    kernel = torch.zeros(1, 3, 2, 1)
    kernel[0, 0, 1] = 4.0
    figures.draw(tmp_path / "filters.png", Tiles("filters", "Kernels", kernel))
    (tile,) = shown(drawn[0])
    np.testing.assert_allclose(tile[:, 0], [GREY, [1.0, 0.5, 0.5]])  # by hand: 0.5 + 0.5 * 4 / 4 of red
    assert "channels as red, green and blue, zero grey" in words(drawn[0])


def test_other_channels_stand_below_one_another_or_as_their_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw(tmp_path / "two.png", Tiles("two", "Kernels", numbers(5, 2, 7, 3)))
    assert [tile.shape[:2] for tile in shown(drawn[0])] == [(15, 3)] * 5  # two of 7 rows, and a row between
    assert "2 channels below one another" in words(drawn[0])
    weights = torch.tensor([1.0, 2.0, -3.0, 0.0, 0.0]).view(1, 5, 1, 1) * torch.tensor([[1.0, 0.0]])
    figures.draw(tmp_path / "five.png", Tiles("five", "Kernels", weights))
    np.testing.assert_allclose(shown(drawn[1])[0], [[WHITE, WHITE]], atol=0.01)  # 1 + 2 - 3 = 0
    assert "mean of the 5 channels" in words(drawn[1])


def test_samples_have_one_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    tiles = torch.tensor([[0.0, 4.0], [2.0, 16.0]])[:, None, None]
    figures.draw(tmp_path / "samples.png", Tiles("samples", "Samples", tiles, signed=False))
    assert [tile[0, :, 0].tolist() for tile in shown(drawn[0])] == [[0.0, 0.25], [0.125, 1.0]]  # by hand: of 16


def test_many_tiles_say_how_many_of_how_many(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw(tmp_path / "a.png", Tiles("a", "Filters", numbers(1_009, 1, 3, 3)))
    assert "the first 64 of 1,009" in words(drawn[0])
    assert len(drawn[0].axes[0].images) == 64
    figures.draw(tmp_path / "b.png", Tiles("b", "Filters", numbers(41, 3)))
    assert "the first 40 of 41" in words(drawn[1])
    figures.draw(tmp_path / "c.png", Tiles("c", "Filters", numbers(64, 1, 3, 3)))
    assert " of " not in words(drawn[2])


def test_weights_of_few_features_are_bars_around_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    """Each in its own range, though one feature's weights are a thousand times the others'."""
    figures.draw(tmp_path / "w.png", Tiles("w", "Weights", torch.tensor([[1_000.0, -500.0, 1.0], [0.2, 0.1, 0.0]])))
    heights = [[bar.get_height() for bar in axes.patches] for axes in drawn[0].axes]
    np.testing.assert_allclose(heights, [[1.0, -0.5, 0.001], [1.0, 0.5, 0.0]])
    assert "each in its own range" in words(drawn[0])
    assert "each feature scaled" not in words(drawn[0])
    figures.draw(tmp_path / "line.png", Tiles("line", "Weights", numbers(2, 41)))
    assert not drawn[1].axes[0].patches  # more than 40 numbers: a line
    zero, line = drawn[1].axes[0].lines
    assert list(zero.get_ydata()) == [0, 0]
    assert len(line.get_ydata()) == 41


# --- histograms, curves


def test_a_histogram_counts_what_is_finite_and_marks_places(tmp_path: Path, drawn: list[Figure]) -> None:
    values = torch.tensor([0.1, 0.2, 0.2, 0.9, torch.nan, torch.inf])
    figures.draw(tmp_path / "h.png", Histogram("h", "Activity", values, "mean activity", {"target": 0.3}))
    axes = drawn[0].axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert "4 values; mean 0.35, median 0.2; 2 values not finite left out" in words(drawn[0])  # by hand
    assert axes.get_xlabel() == "mean activity"
    assert [line.get_xdata()[0] for line in axes.lines] == [0.3]
    assert [text.get_text() for text in axes.texts] == ["target 0.3"]


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((1,), 3.0), numbers(100_003) ** 9, torch.tensor([1, 2, 3])])
def test_a_histogram_of_one_value_or_of_extremes(tmp_path: Path, drawn: list[Figure], values: torch.Tensor) -> None:
    figures.draw(tmp_path / "h.png", Histogram("h", "Activity", values, "activity"))
    bars = drawn[0].axes[0].patches
    assert sum(bar.get_height() for bar in bars) == len(values)
    assert len(bars) <= 60


def test_curves_start_at_one_and_name_themselves(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = {"mean": torch.tensor([4.0, 2.0, 1.0]), "largest": torch.tensor([9.0, 3.0])}
    figures.draw(tmp_path / "l.png", Lines("l", "Singular values", lines, "index", "singular value"))
    axes = drawn[0].axes[0]
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines} == {
        "mean": ([1, 2, 3], [4.0, 2.0, 1.0]),
        "largest": ([1, 2], [9.0, 3.0]),
    }
    assert legend(drawn[0]) == ["mean", "largest"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("index", "singular value", "linear")


def test_a_logarithmic_axis_leaves_gaps_at_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw(tmp_path / "l.png", Lines("l", "Costs", {"cost": torch.tensor([512.0, 0.0, 2**-9])}, "step", "nats", log=True))
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [512.0, np.nan, 2**-9])
    assert axes.get_legend() is None  # one curve: the axis names it
    assert "logarithmic scale" in words(drawn[0])


def test_more_curves_than_can_be_told_apart_have_no_legend(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw(tmp_path / "l.png", Lines("l", "Rows", {str(row): numbers(5) for row in range(29)}, "index", "value"))
    assert drawn[0].axes[0].get_legend() is None
    assert len(drawn[0].axes[0].lines) == 29
    assert "29 curves" in words(drawn[0])


# --- what every picture keeps


def test_the_page_is_as_wide_as_its_words(tmp_path: Path, drawn: list[Figure]) -> None:
    title = "Filters of the first layer: the weights into each unit, as the sample that excites it most"
    figures.draw(tmp_path / "one.png", Tiles("one", title, numbers(1, 1, 3, 3)))
    renderer = drawn[0].canvas.get_renderer()
    ends = [text.get_window_extent(renderer).x1 for text in drawn[0].texts]
    assert max(ends) <= drawn[0].bbox.x1


def test_tensors_come_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    """Parameters with gradients, half precision."""
    figures.draw(tmp_path / "a.png", Tiles("a", "Weights", torch.nn.Parameter(numbers(3, 5))))
    figures.draw(tmp_path / "b.png", Histogram("b", "Values", numbers(11).bfloat16(), "value"))
    assert len(drawn) == 2


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    paths = [figures.draw(tmp_path / name, Tiles("a", "Weights", numbers(5, 1, 3, 3))) for name in ("a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Tiles("w", "Weights", torch.full((2, 3), torch.nan)), "tiles 'w' must be finite numbers"),
        (Tiles("w", "Weights", numbers(0, 1, 3, 3)), "tiles 'w' must be finite numbers"),
        (Tiles("w", "Weights", numbers(3)), r"got \(3,\)"),
        (Tiles("first layer", "Weights", numbers(2, 3)), "'first layer': a name is that of a file"),
        (Tiles("w", " ", numbers(2, 3)), "tiles 'w' have no title"),
        (Histogram("h", "Values", torch.tensor([torch.nan]), "value"), r"histogram 'h' needs values \(n,\), some finite"),
        (Histogram("h", "Values", numbers(3, 5), "value"), r"some finite; got \(3, 5\)"),
        (Lines("l", "Costs", {"a": numbers(5), "b": numbers(2, 3)}, "x", "y"), r"values \(n,\) each; got \[\(5,\), \(2, 3\)\]"),
        (Lines("l", "Costs", {}, "x", "y"), "lines 'l' have no finite value"),
        (Lines("l", "Costs", {"a": -numbers(5).abs()}, "x", "y", log=True), "lines 'l' have no positive value"),
        (numbers(3, 5), "is Tiles, Histogram or Lines, not Tensor"),
    ],
)
def test_what_cannot_be_drawn_leaves_nothing_behind(tmp_path: Path, picture: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.draw(tmp_path / "figure.png", picture)
    assert list(tmp_path.iterdir()) == []


# --- reconstructions of what was corrupted


@pytest.mark.parametrize("kind", ["image", "vector"])
def test_reconstructions_say_how_far_off_the_corrupted_sample_was(tmp_path: Path, drawn: list[Figure], kind: str) -> None:
    """Off by 0.5 before and by 0.05 after, values between 0 and 1: 10 log10(1 / 0.25) = 6.0 and 10 log10(1 / 0.0025) = 26.0."""
    x = np.zeros((3, 1, 7, 5)) if kind == "image" else np.zeros((3, 7))
    figures.reconstructions(tmp_path / "r.png", x, x + 0.05, kind, corrupted=x + 0.5, peak=1.0)
    assert "mean squared error 0.0025 a value, in stored units (corrupted: 0.25)" in words(drawn[0])
    assert "PSNR 26.0 dB (corrupted: 6.0 dB)" in words(drawn[0])


def test_reconstructions_without_corruption_say_their_own_error(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.zeros((3, 1, 7, 5))
    figures.reconstructions(tmp_path / "r.png", x, x + 0.5, "image")
    assert "mean squared error 0.25 a value, in stored units" in words(drawn[0])
    assert "corrupted" not in words(drawn[0])
    assert "PSNR" not in words(drawn[0])
