"""Predictions of a model over rows, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import Distribution

from ssl_ae import metrics
from ssl_ae.data.card import Y
from ssl_ae.data.loading import Feed
from ssl_ae.model import Model, frozen

BATCH_ROWS = 1024


@dataclass(frozen=True)
class Predictions:
    """What a model makes of N rows."""

    values: np.ndarray  # (N, C) class probabilities, or (N, T) expected targets
    codes: np.ndarray  # (N, K), what the head saw


def values_of(p_y: Distribution) -> torch.Tensor:
    """(B, C) class probabilities, or (B, T) expected targets."""
    return p_y.probs if not p_y.event_shape else p_y.mean


def predict_rows(model: Model, feed: Feed) -> Predictions:
    """Predict every row, in order; deterministic: the code is E[z|x]."""
    values, codes = [], []
    with frozen(model), torch.inference_mode():
        for batch in feed.in_order(BATCH_ROWS, np.arange(feed.split.rows)):
            z = model.features(batch.x)
            codes.append(z.float().cpu().numpy())
            values.append(values_of(model.p_y(z, batch.x)).float().cpu().numpy())
    return Predictions(np.concatenate(values), np.concatenate(codes))


def score(values: np.ndarray, labels: np.ndarray, y: Y) -> dict[str, float]:
    """Figures of merit by the kind of labels; nothing where no label is known."""
    return {"classes": metrics.classification, "regression": metrics.regression, "multilabel": metrics.multilabel}[y.task](
        values, labels
    )


HEADLINE = {"classes": "accuracy", "regression": "rmse", "multilabel": "accuracy"}


def better(task: str, ours: float, theirs: float) -> bool:
    """Whether the first headline figure beats the second."""
    return ours < theirs if HEADLINE[task] == "rmse" else ours > theirs
