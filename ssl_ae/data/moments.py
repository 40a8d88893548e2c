"""Range, mean and standard deviation of a stream of samples, without holding them."""

from __future__ import annotations

import numpy as np

from ssl_ae.data.card import X


class Moments:
    """Running figures over blocks (n, *shape), in float64; the population's variance, merged as in Chan et al. 1979."""

    def __init__(self) -> None:
        self.rows = 0
        self.low, self.high = np.inf, -np.inf  # over all numbers
        self._mean: np.ndarray | float = 0.0
        self._square: np.ndarray | float = 0.0  # sum of squared differences from the mean

    def add(self, x: np.ndarray) -> None:
        if not len(x):
            return
        # numpy's minimum hands NaN on, Python's min may not
        self.low, self.high = float(np.minimum(self.low, x.min())), float(np.maximum(self.high, x.max()))
        if not self.finite:
            return
        values = x.astype(np.float64)
        mean, rows = values.mean(axis=0), self.rows + len(x)
        apart = mean - self._mean
        self._square = self._square + ((values - mean) ** 2).sum(axis=0) + apart**2 * (self.rows * len(x) / rows)
        self._mean = self._mean + apart * (len(x) / rows)
        self.rows = rows

    @property
    def finite(self) -> bool:
        """Whether no number so far was NaN or infinite; the other figures mean nothing otherwise."""
        return not (np.isnan([self.low, self.high]).any() or self.low == -np.inf or self.high == np.inf)

    def feature_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of each feature; std is 1 where a feature is constant, so that dividing by it is harmless."""
        std = np.sqrt(np.atleast_1d(self._square) / max(self.rows, 1))
        return tuple(np.atleast_1d(self._mean).tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def described(x: X, every: Moments, train: Moments) -> X:
    """`x` with the range of all float samples, and for vectors the mean and std of the train split."""
    found: dict[str, tuple[float, ...]] = {}
    if x.dtype == "float32" and every.rows:
        found["range"] = (every.low, every.high)
    if x.kind == "vector" and train.rows:
        found["mean"], found["std"] = train.feature_scale()
    return x.model_copy(update=found)
