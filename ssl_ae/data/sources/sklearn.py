"""Data sets known by name, through scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_ae.data.card import Task, X
from ssl_ae.data.holdout import hash_order
from ssl_ae.data.sources import TO_BE_MEASURED, Block, Description, PackOptions, Source, numbered_keys, path_of, rows_a_block
from ssl_ae.errors import DataError

TEST_SHARE = 5  # one sample in five, where a data set has no test split of its own
MNIST_TRAIN_ROWS = 60_000  # OpenML keeps the 10,000 test images behind them
PATCH = 16  # height and width of a patch of a photograph, in pixels


@dataclass(frozen=True)
class _Split:
    keys: Sequence[str]
    x: np.ndarray  # (n, *shape)
    labels: np.ndarray  # (n,) int64 | (n, T) float32


@dataclass(frozen=True)
class _Loaded:
    x: X
    task: Task
    names: tuple[str, ...]  # of the classes or targets
    splits: dict[str, _Split]
    licence: str


class Named(Source):
    """`digits`: 1,797 handwritten digits of 8 x 8 pixels from 0 to 16, which come with scikit-learn.

    `photos`: 2,080 colour patches of 16 x 16 pixels, the non-overlapping ones of the two photographs that come with
    scikit-learn; the class is the photograph. A patch's neighbours may be in another split.

    `diabetes`: ten measurements of 442 patients, in their own units, and the progression of their disease a year later
    (Efron et al. 2004), which come with scikit-learn.

    `breast_cancer`, `wine`, `iris`: 569 tumours of 30 measurements and two classes, 178 wines of 13 and three, 150 flowers of
    four and three, which come with scikit-learn.

    These have no test split of their own: of each class (of all patients), the first fifth (rounded down) in the order of
    the sha256 of the key is test. Keys are `digits-00000000`, `china-00000000`, `flower-00000000`, `diabetes-00000000`, ...
    in scikit-learn's order, each data set by its name; patches are numbered row by row.

    `mnist`: the 60,000 and 10,000 images of MNIST, fetched from openml.org into scikit-learn's cache on first use.
    Keys are those of the IDX files, `train-00000000` and `test-00000000`, ...
    """

    name = "sklearn"
    summary = "digits, photos, diabetes, breast_cancer, wine, iris (come with scikit-learn), mnist (from openml.org), by name"

    @classmethod
    def recognises(cls, place: str) -> bool:
        return place in LOADERS and not path_of(place).exists()

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name)
        self._place, self._loaded = place, LOADERS[place]()

    def describe(self) -> Description:
        found = self._loaded
        return Description(self._place, found.x, found.task, found.names, tuple(found.splits), found.licence)

    def keys(self, split: str) -> Sequence[str]:
        return self._loaded.splits[split].keys

    def blocks(self, split: str) -> Iterator[Block]:
        whole, step = self._loaded.splits[split], rows_a_block(self._loaded.x)
        for start in range(0, len(whole.keys), step):
            part = slice(start, start + step)
            yield Block(whole.keys[part], whole.x[part], whole.labels[part])


def _images(x: np.ndarray, maximum: int) -> X:
    return X(kind="image", dtype="uint8", shape=x.shape[1:], range=(0, maximum))


def _with_test(keys: Sequence[str], x: np.ndarray, labels: np.ndarray, strata: np.ndarray) -> dict[str, _Split]:
    """Train, and of each stratum (n,) the first fifth in the order of the hashed keys as test."""
    keys = np.array(keys, dtype=object)
    test = np.zeros(len(keys), dtype=bool)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        test[rows[hash_order(keys[rows])[: len(rows) // TEST_SHARE]]] = True
    return {name: _Split(keys[at].tolist(), x[at], labels[at]) for name, at in (("train", ~test), ("test", test))}


def _digits() -> _Loaded:
    from sklearn.datasets import load_digits  # takes a second to import

    found = load_digits()
    x, labels = found.images.astype(np.uint8)[:, None], found.target.astype(np.int64)
    splits = _with_test(numbered_keys("digits", 0, len(x)), x, labels, labels)
    licence = "CC BY 4.0, UCI Machine Learning Repository, Optical Recognition of Handwritten Digits"
    return _Loaded(_images(x, 16), "classes", tuple(str(digit) for digit in range(10)), splits, licence)


def _photos() -> _Loaded:
    from sklearn.datasets import load_sample_image

    names = ("china", "flower")
    parts = [_patches(load_sample_image(f"{name}.jpg")) for name in names]
    keys = [key for name, part in zip(names, parts, strict=True) for key in numbered_keys(name, 0, len(part))]
    x, labels = np.concatenate(parts), np.repeat(np.arange(len(names)), [len(part) for part in parts])
    licence = "CC BY 2.0, china by danielbuechele and flower by vultilion on flickr.com, cut into patches"
    return _Loaded(_images(x, 255), "classes", names, _with_test(keys, x, labels, labels), licence)


def _patches(photo: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (n, 3, 16, 16), row by row; what is left over below and to the right belongs to no patch."""
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    tiled = photo[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
    return np.ascontiguousarray(tiled.transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH))


def _diabetes() -> _Loaded:
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    x, y = found.data.astype(np.float32), found.target.astype(np.float32)[:, None]
    splits = _with_test(numbered_keys("diabetes", 0, len(x)), x, y, np.zeros(len(x)))
    about = _columns(x, found.feature_names)
    licence = "none stated; published with Efron, Hastie, Johnstone & Tibshirani 2004, Least Angle Regression"
    return _Loaded(about, "regression", ("progression",), splits, licence)


def _classes(name: str, licence: str) -> _Loaded:
    """A table of measurements and classes."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    x, labels = found.data.astype(np.float32), found.target.astype(np.int64)
    splits = _with_test(numbered_keys(name, 0, len(x)), x, labels, labels)
    return _Loaded(_columns(x, found.feature_names), "classes", tuple(map(str, found.target_names)), splits, licence)


def _columns(x: np.ndarray, names: Sequence[str]) -> X:
    return X(kind="vector", dtype="float32", shape=x.shape[1:], range=TO_BE_MEASURED, features=tuple(map(str, names)))


def _mnist() -> _Loaded:
    from sklearn.datasets import fetch_openml

    try:
        found = fetch_openml("mnist_784", version=1, as_frame=False)
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: a file that came damaged
        raise DataError(
            f"mnist cannot be fetched from openml.org: {error}. Without internet, pack a folder with MNIST's four IDX "
            "files, or use the data set digits."
        ) from error
    x = found.data.astype(np.uint8).reshape(-1, 1, 28, 28)
    labels = found.target.astype(np.int64)
    rows = {"train": slice(0, MNIST_TRAIN_ROWS), "test": slice(MNIST_TRAIN_ROWS, len(x))}
    splits = {name: _Split(numbered_keys(name, 0, len(labels[at])), x[at], labels[at]) for name, at in rows.items()}
    names = tuple(str(digit) for digit in range(10))
    return _Loaded(_images(x, 255), "classes", names, splits, found.details.get("licence", ""))


UCI = "CC BY 4.0, UCI Machine Learning Repository"
LOADERS = {
    "digits": _digits,
    "photos": _photos,
    "diabetes": _diabetes,
    "breast_cancer": lambda: _classes("breast_cancer", f"{UCI}, Breast Cancer Wisconsin (Diagnostic)"),
    "wine": lambda: _classes("wine", f"{UCI}, Wine"),
    "iris": lambda: _classes("iris", f"{UCI}, Iris"),
    "mnist": _mnist,
}
