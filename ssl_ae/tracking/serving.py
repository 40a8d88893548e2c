"""From a finetuned model to an MLflow pyfunc model that answers on raw rows.

A models-from-code script calls `serve`, and `Tracker.model` logs that script with a folder of our own files:

    from ssl_ae.tracking.serving import serve
    serve(load_predictor)          # Path of that folder -> Predictor
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ssl_ae.tracking.logged_model import ARTIFACTS


class Predictor(Protocol):
    def predict(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """x (n, *shape) in the card's dtype -> columns, each (n,) or (n, C)."""


def serve(load: Callable[[Path], Predictor]) -> None:
    """Make the calling script an MLflow model: `load` gets the artifacts folder when the model is loaded."""
    import mlflow
    import pandas as pd
    from mlflow.pyfunc import PythonModel

    class Served(PythonModel):
        def load_context(self, context: Any) -> None:
            self._x = context.model_config["x"]
            self._predictor = load(Path(context.artifacts[ARTIFACTS]))

        # anything `rows` reads is welcome; this is the hint by which mlflow neither converts inputs nor asks for hints
        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
            try:
                x = rows(model_input, self._x)
            except ValueError as error:  # a server answers 400, the caller's mistake, to this exception alone
                raise mlflow.MlflowException.invalid_parameter_value(str(error)) from error
            return pd.DataFrame(columns(self._predictor.predict(x)))

    mlflow.models.set_model(Served())


def rows(given: Any, x: Mapping[str, Any]) -> np.ndarray:
    """A DataFrame, an array, nested lists or a dict of columns as (n, *shape) in the dtype of the card's `x`.

    A vector's named columns may come in any order and among others; unnamed ones are taken as they stand. Rows of an
    image or signal may also come flat. Raises ValueError for anything else.
    """
    import pandas as pd

    features, shape = x.get("features"), tuple(x["shape"])
    if isinstance(given, Mapping):
        only = next(iter(given.values())) if len(given) == 1 else None
        # a single entry may hold whole samples: {"x": tensor}
        given = only if np.ndim(only) > 1 else pd.DataFrame({name: np.asarray(value) for name, value in given.items()})
    if isinstance(given, pd.DataFrame):
        named = any(isinstance(name, str) for name in given.columns)
        if features and named:
            missing = [name for name in features if name not in given.columns]
            if missing:
                raise ValueError(
                    f"the rows lack {len(missing)} of the model's {len(features)} columns: {', '.join(missing[:10])}."
                )
            given = given[list(features)]
        given = given.to_numpy()
    return _as_dtype(_as_shape(_as_numbers(given), shape), np.dtype(x["dtype"]))


def columns(predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The predictor's columns; one of (n, C) becomes C columns NAME_0, NAME_1, ..."""
    flat: dict[str, np.ndarray] = {}
    for name, values in predictions.items():
        if np.ndim(values) == 1:
            flat[name] = values
        else:
            flat |= {f"{name}_{index}": column for index, column in enumerate(np.asarray(values).T)}
    return flat


def _as_numbers(given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
        return array if array.dtype.kind in "biuf" else array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the rows must be numbers, all of one length: {error}.") from error


def _as_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape[1:] == shape:
        return array
    if array.ndim == 2 and array.shape[1] == math.prod(shape):
        return array.reshape(-1, *shape)
    expected = ", ".join(str(length) for length in shape)
    raise ValueError(f"expected rows of shape (n, {expected}), got {array.shape}.")


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    if array.size and not (np.equal(np.floor(array), array).all() and array.min() >= limits.min and array.max() <= limits.max):
        raise ValueError(f"expected whole numbers from {limits.min} to {limits.max} ({dtype}).")
    return array.astype(dtype)
