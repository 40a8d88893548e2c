"""The picture of queries and their neighbours."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ssl_ae import figures

pytestmark = pytest.mark.usefixtures("rendered")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is written."""
    seen, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **more: (seen.append(figure), write(figure, *given, **more)))
    return seen


SHAPES = {"image": (1, 7, 5), "vector": (11,), "signal": (2, 13)}


def given(kind: str, queries: int, count: int):
    rng = np.random.default_rng(0)
    x, found = rng.random((queries, *SHAPES[kind])), rng.random((queries, count, *SHAPES[kind]))
    return x, found, [f"key-{i}" for i in range(queries)], [[f"{i}.{j}" for j in range(count + 1)] for i in range(queries)]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("queries", "count"), [(1, 1), (3, 10), (13, 17)])
def test_a_row_a_query_and_a_caption_a_cell(tmp_path: Path, drawn: list[Figure], kind: str, queries: int, count: int) -> None:
    x, found, names, captions = given(kind, queries, count)
    path = figures.neighbours(tmp_path / "like.png", x, found, names, captions, kind, detail="by bits")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert all(90 <= side <= 2_600 for side in picture.size)
    (axes,) = drawn[0].axes
    rows, columns = min(queries, 10), 1 + min(count, 10)
    assert [text.get_text() for text in axes.get_yticklabels()] == names[:rows]
    assert [text.get_text() for text in axes.texts] == [caption for row in captions[:rows] for caption in row[:columns]]
    if kind == "image":
        assert len(axes.images) == rows * columns
        shown = np.asarray(axes.images[0].get_array())[..., 0]
        high = max(x[:10].max(), found[:10, :10].max())
        np.testing.assert_allclose(shown, x[0, 0] / high, atol=1e-6)  # the query comes first, all on one scale from 0
    words = "\n".join(text.get_text() for text in drawn[0].texts)
    assert "Nearest neighbours by code" in words
    assert ("the first 10 of 13 queries" in words) == (queries == 13)


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    x, found, names, captions = given("image", 3, 5)
    with pytest.raises(ValueError, match="as many rows as queries"):
        figures.neighbours(tmp_path / "p.png", x[:2], found, names, captions, "image")
    with pytest.raises(ValueError, match="need a name each, and a caption a cell"):
        figures.neighbours(tmp_path / "p.png", x, found, names, captions[:2], "image")
    assert not list(tmp_path.iterdir())
