"""Figures: the right file, the right size, the right words at the edges, and nothing left behind by a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.datasets import load_digits

from ssl_ae import figures
from ssl_ae.figures import page

pytestmark = pytest.mark.usefixtures("rendered")


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def assert_picture(path: Path) -> tuple[int, int]:
    """The only file of its folder is a PNG that decodes, neither a thumbnail nor a poster."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(200 <= side <= 2_600 for side in picture.size)
        return picture.size


def words(figure: Figure) -> str:
    """Title and detail line."""
    return "\n".join(text.get_text() for text in figure.texts)


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_learning_curves_put_train_and_val_of_one_metric_in_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    series = {
        "train/loss": ([0, 50, 100], [9.0, 5.0, 3.0]),
        "val/loss": ([50, 100], [6.0, 4.0]),
        "val/accuracy": ([50, 100], [0.5, 0.75]),
        "lr": ([0, 50, 100], [1e-3, 1e-3, 1e-4]),
    }
    assert_picture(figures.learning_curves(tmp_path / "curves.png", series))
    panels = {axes.get_title(loc="left"): legend(axes) for axes in drawn[0].axes}
    assert panels == {"loss": ["train  3", "val  4"], "accuracy": ["val  0.75"], "lr": ["0.0001"]}
    assert len({line.get_color() for line in drawn[0].axes[0].lines}) == 2


def test_learning_curves_survive_one_point_and_values_that_are_not_finite(tmp_path: Path, drawn: list[Figure]) -> None:
    series = {"val/accuracy": ([10], [0.5]), "train/loss": ([1, 2], [np.nan, np.inf])}
    assert_picture(figures.learning_curves(tmp_path / "curves.png", series))
    assert legend(drawn[0].axes[1]) == ["train  never finite"]


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 13])
def test_images_of_any_size_and_channels(tmp_path: Path, drawn: list[Figure], channels: int, count: int) -> None:
    x = numbers(count, channels, 7, 5)
    assert_picture(figures.reconstructions(tmp_path / "rec.png", x, x + 0.5, "image", corrupted=x - 1))
    assert len(drawn[0].axes) == 3 * min(count, 10)
    assert "mean squared error 0.25 a value" in words(drawn[0])  # by hand: every value is off by 0.5
    assert ("mean of the 2 channels" in words(drawn[0])) == (channels == 2)


def test_bytes_are_scaled_by_the_originals_alone(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.zeros((2, 1, 7, 5), np.uint8)
    x[:, :, 3] = 16
    figures.reconstructions(tmp_path / "rec.png", x, np.full(x.shape, 4, np.uint8), "image")
    original, rebuilt = (drawn[0].axes[place].images[0].get_array() for place in (0, 2))
    assert (original.max(), rebuilt.max()) == (1.0, 0.25)  # by hand: 16/16 and 4/16
    assert "mean squared error 34.3 a value" in words(drawn[0])  # by hand: (6 * 4² + (16 - 4)²) / 7


@pytest.mark.parametrize(
    ("kind", "shape"), [("vector", (3, 1)), ("vector", (11, 13)), ("vector", (2, 97)), ("signal", (3, 2, 4_001))]
)
@pytest.mark.parametrize("corrupted", [False, True])
def test_profiles_name_their_lines(
    tmp_path: Path, drawn: list[Figure], kind: page.Kind, shape: tuple[int, ...], corrupted: bool
) -> None:
    x = numbers(*shape)
    path = tmp_path / "rec.png"
    assert_picture(figures.reconstructions(path, x, x, kind, corrupted=x + 0.1 if corrupted else None))
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == (["original", "corrupted", "reconstruction"] if corrupted else ["original", "reconstruction"])


def test_a_long_line_keeps_its_highest_peak(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.zeros((1, 1, 100_003))
    x[0, 0, 77_777] = 5.0
    figures.sample_grid(tmp_path / "grid.png", x, ["click"], "signal")
    line = drawn[0].axes[0].lines[0].get_ydata()
    assert len(line) <= 4_000
    assert line.max() == 5.0


def test_a_feature_of_another_magnitude_does_not_flatten_the_others(tmp_path: Path, drawn: list[Figure]) -> None:
    x = np.array([[0.0, 1.0, 1_000.0], [1.0, 3.0, 5_000.0], [0.5, 2.0, 3_000.0]])
    figures.sample_grid(tmp_path / "grid.png", x, ["a", "b", "c"], "vector")
    assert "each feature scaled to its range" in words(drawn[0])
    heights = [bar.get_height() for bar in drawn[0].axes[2].patches]
    assert heights == [0.5, 0.5, 0.5]  # by hand: row 2 is the middle of each feature's range


def test_sample_grid_shows_forty_and_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    digits = load_digits()
    path = tmp_path / "grid.png"
    assert_picture(figures.sample_grid(path, digits.images[:, None], [str(y) for y in digits.target], "image"))
    assert "40 of 1,797 samples" in words(drawn[0])
    assert [axes.get_title() for axes in drawn[0].axes] == [str(y) for y in digits.target[:40]]


def test_confusion_matrix_counts_by_hand(tmp_path: Path, drawn: list[Figure]) -> None:
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, -1]), np.array([0, 0, 0, 2, 1, 0, 1])
    assert_picture(figures.confusion_matrix(tmp_path / "confusion.png", labels, predictions, ["cat", "dog", "owl"]))
    assert words(drawn[0]).startswith("Confusion matrix: 66.7% of 6 rows correct")  # 4 of 6
    assert "1 unlabelled left out" in words(drawn[0])
    cells = {text.get_position(): text.get_text() for text in drawn[0].axes[0].texts}  # (column, row)
    assert cells == {(0, 0): "3\n75%", (2, 0): "1\n25%", (0, 1): "1\n50%", (1, 1): "1\n50%"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("classes", "written"), [(1, True), (30, True), (31, False), (211, False)])
def test_confusion_matrix_of_few_and_many_classes(tmp_path: Path, drawn: list[Figure], classes: int, written: bool) -> None:
    labels = np.arange(997) % classes
    names = [f"species number {label}" for label in range(classes)]
    assert_picture(figures.confusion_matrix(tmp_path / "confusion.png", labels, labels, names))
    assert len(drawn[0].axes[0].texts) == (classes if written else 0)
    assert len(drawn[0].axes[0].get_xticks()) <= 50


@pytest.mark.parametrize(("size", "axis"), [(1, "z1"), (2, "z1"), (3, "t-SNE 1"), (67, "t-SNE 1")])
@pytest.mark.parametrize("target", ["classes", "one class", "few labels", "no labels", "regression", "two targets"])
def test_latent_map_of_any_size_and_target(tmp_path: Path, drawn: list[Figure], size: int, axis: str, target: str) -> None:
    rows = 101
    labels = {
        "classes": np.arange(rows) % 7,
        "one class": np.zeros(rows, int),
        "few labels": np.where(np.arange(rows) % 11, -1, 3),
        "no labels": None,
        "regression": np.where(np.arange(rows) % 5, numbers(rows), np.nan),
        "two targets": numbers(rows, 2),
    }[target]
    assert_picture(figures.latent_map(tmp_path / "map.png", numbers(rows, size), labels, ["alpha"]))
    assert drawn[0].axes[0].get_xlabel().startswith(axis)
    assert len(drawn[0].axes) == (2 if target in ("regression", "two targets") else 1)  # a colour bar
    if target in ("few labels", "no labels"):
        assert legend(drawn[0].axes[0])[-1] == "unlabelled"


def test_latent_map_keeps_far_groups_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    """Three groups 30 standard deviations apart in 5 dimensions: on the map every point is nearest to its own group."""
    groups = np.repeat(np.arange(3), 37)
    figures.latent_map(tmp_path / "map.png", numbers(111, 5) + 30.0 * np.eye(5)[groups], groups, ["a", "b", "c"])
    shown = drawn[0].axes[0].collections[0]
    points, colors = np.asarray(shown.get_offsets()), shown.get_facecolors()
    kinds = np.unique(colors, axis=0)
    members = [points[(colors == kind).all(1)] for kind in kinds]
    centres = np.stack([member.mean(0) for member in members])
    assert len(kinds) == 3
    for i, member in enumerate(members):
        distances = np.linalg.norm(member[:, None] - centres, axis=2)
        assert (distances.argmin(1) == i).all()


@pytest.mark.filterwarnings("error")
def test_latent_map_of_a_collapsed_code(tmp_path: Path, drawn: list[Figure]) -> None:
    assert_picture(figures.latent_map(tmp_path / "map.png", np.zeros((101, 5)), np.arange(101) % 3, ["a", "b", "c"]))
    assert drawn[0].axes[0].get_xlabel() == "z1"  # nothing for t-SNE to arrange


def test_latent_map_draws_a_fixed_sample_that_keeps_the_few_labels(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = np.full(20_011, -1)
    labels[:89] = 0
    paths = [figures.latent_map(tmp_path / name, numbers(20_011, 2), labels, ["only"]) for name in ("a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "5,000 of 20,011 rows, drawn at random" in words(drawn[0])
    assert "89 of 89 labelled rows shown" in words(drawn[0])
    assert len(drawn[0].axes[0].collections[0].get_offsets()) == 5_000


def test_latent_map_names_twenty_classes_at_most(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = np.repeat(np.arange(23), np.arange(23, 0, -1))  # class 0 is the most frequent, 22 the rarest
    assert_picture(figures.latent_map(tmp_path / "map.png", numbers(len(labels), 2), labels, [f"c{n}" for n in range(23)]))
    assert legend(drawn[0].axes[0]) == [*(f"c{n}" for n in range(20)), "3 other classes"]


def test_a_name_with_dollars_is_no_formula(tmp_path: Path, drawn: list[Figure]) -> None:
    """`$x^$` is a formula that matplotlib cannot read, and between `$10 - $20` it would drop the blanks."""
    names, labels = ["$10 - $20", "$x^$"], np.arange(61) % 2
    figures.confusion_matrix(tmp_path / "confusion.png", labels, labels, names)
    figures.latent_map(tmp_path / "map.png", numbers(61, 2), labels, names)
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == names
    assert legend(drawn[1].axes[0]) == names
    assert not any(text.get_parse_math() for figure in drawn for text in figure.findobj(Text))
    figures.learning_curves(tmp_path / "curves.png", {"$loss$": (range(7), [10.0**-step for step in range(7)])})
    (axes,) = drawn[2].axes
    assert not axes.title.get_parse_math()
    assert all(label.get_parse_math() for label in axes.get_yticklabels())  # 10^-3 with its exponent raised


def test_class_colors_are_not_the_grey_of_unlabelled_rows() -> None:
    for colors, count in zip(page.CLASS_COLORS, (10, 20), strict=True):
        assert len({str(color) for color in colors}) == count
        tuples = [color for color in colors if isinstance(color, tuple)]
        assert all(max(color[:3]) - min(color[:3]) > 0.05 for color in tuples)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: figures.learning_curves(path, {}),
        lambda path: figures.learning_curves(path, {"train/loss": ([1, 2], [1.0])}),
        lambda path: figures.reconstructions(path, numbers(3, 7), numbers(3, 5), "vector"),
        lambda path: figures.reconstructions(path, numbers(0, 7), numbers(0, 7), "vector"),
        lambda path: figures.sample_grid(path, numbers(3, 7), ["a", "b"], "vector"),
        lambda path: figures.confusion_matrix(path, np.array([-1, -1]), np.array([0, 0]), ["a"]),
        lambda path: figures.confusion_matrix(path, np.array([0, 1]), np.array([0, 2]), ["a", "b"]),
        lambda path: figures.latent_map(path, np.full((7, 3), np.nan), None),
    ],
)
def test_what_cannot_be_drawn_leaves_nothing_behind(tmp_path: Path, draw) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        draw(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = figures.latent_map(tmp_path / "map.png", numbers(7, 2), None)
    before = path.read_bytes()

    def full_disk(figure: Figure, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        figures.latent_map(path, numbers(11, 2), None)
    assert path.read_bytes() == before
    assert_picture(path)
