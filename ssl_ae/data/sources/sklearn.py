"""Data sets known by name, through scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_ae.data.card import X
from ssl_ae.data.holdout import hash_order
from ssl_ae.data.sources import Block, Description, PackOptions, Source, numbered_keys, path_of, rows_a_block
from ssl_ae.errors import DataError

DIGITS_TEST_SHARE = 5  # one digit in five
MNIST_TRAIN_ROWS = 60_000  # OpenML keeps the 10,000 test images behind them


@dataclass(frozen=True)
class _Split:
    keys: Sequence[str]
    x: np.ndarray  # (n, 1, H, W) uint8
    labels: np.ndarray  # (n,) int64


class Named(Source):
    """`digits`: 1,797 handwritten digits of 8 x 8 pixels from 0 to 16, which come with scikit-learn.

    They have no test split of their own: of each class, the first fifth (rounded down) in the order of the sha256 of
    the key is test. Keys are `digits-00000000`, ... in scikit-learn's order.

    `mnist`: the 60,000 and 10,000 images of MNIST, fetched from openml.org into scikit-learn's cache on first use.
    Keys are those of the IDX files, `train-00000000` and `test-00000000`, ...
    """

    name = "sklearn"
    summary = "digits (comes with scikit-learn) or mnist (fetched from openml.org), by name"

    @classmethod
    def recognises(cls, place: str) -> bool:
        return place in LOADERS and not path_of(place).exists()

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name)
        self._place = place
        self._splits, maximum, self._licence = LOADERS[place]()
        self._x = X(kind="image", dtype="uint8", shape=self._splits["train"].x.shape[1:], range=(0, maximum))

    def describe(self) -> Description:
        names = tuple(str(digit) for digit in range(10))
        return Description(self._place, self._x, "classes", names, tuple(self._splits), self._licence)

    def keys(self, split: str) -> Sequence[str]:
        return self._splits[split].keys

    def blocks(self, split: str) -> Iterator[Block]:
        whole, step = self._splits[split], rows_a_block(self._x)
        for start in range(0, len(whole.keys), step):
            part = slice(start, start + step)
            yield Block(whole.keys[part], whole.x[part], whole.labels[part])


def _digits() -> tuple[dict[str, _Split], int, str]:
    from sklearn.datasets import load_digits  # takes a second to import

    found = load_digits()
    keys = np.array(numbered_keys("digits", 0, len(found.images)), dtype=object)
    labels = found.target.astype(np.int64)
    test = np.zeros(len(keys), dtype=bool)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        test[rows[hash_order(keys[rows])[: len(rows) // DIGITS_TEST_SHARE]]] = True
    x = found.images.astype(np.uint8)[:, None]
    splits = {name: _Split(keys[at].tolist(), x[at], labels[at]) for name, at in (("train", ~test), ("test", test))}
    return splits, 16, "CC BY 4.0, UCI Machine Learning Repository, Optical Recognition of Handwritten Digits"


def _mnist() -> tuple[dict[str, _Split], int, str]:
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
    return splits, 255, found.details.get("licence", "")


LOADERS = {"digits": _digits, "mnist": _mnist}
