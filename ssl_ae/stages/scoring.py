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
from ssl_ae.trace import Batch

BATCH_ROWS = 1024


@dataclass(frozen=True)
class Predictions:
    """What a head says of N rows; `nats` is l_X of each row where the decoder ran."""

    values: np.ndarray  # (N, C) class probabilities, or (N, T) expected targets
    nats: np.ndarray | None = None  # (N,)


def values_of(p_y: Distribution) -> torch.Tensor:
    """(B, C) class probabilities, or (B, T) expected targets."""
    return p_y.probs if not p_y.event_shape else p_y.mean


def predict_rows(model: Model, feed: Feed, rows: np.ndarray | None = None, decode: bool = False) -> Predictions:
    """Predict the given rows, or every row, in order; deterministic: the code is E[z|x]. With `decode`, l_X of each row too."""
    values, nats = [], []
    everything = np.arange(feed.split.rows) if rows is None else rows
    with frozen(model), torch.inference_mode():
        for batch in feed.in_order(BATCH_ROWS, everything):
            p_y, l_x = predict_batch(model, batch, decode)
            values.append(p_y.float().cpu().numpy())
            if decode:
                nats.append(l_x.float().cpu().numpy())
    return Predictions(np.concatenate(values), np.concatenate(nats) if decode else None)


def predict_batch(model: Model, batch: Batch, decode: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, C or T) and, with `decode`, (B,) -log p(x | E[z|x]) in nats. Call in evaluation mode."""
    z = model.features(batch.x)
    l_x = -model.decode(z).log_prob(batch.target) if decode else None
    return values_of(model.head(z)), l_x


def score(values: np.ndarray, labels: np.ndarray, y: Y) -> dict[str, float]:
    """Figures of merit by the kind of labels; nothing where no label is known."""
    return {"classes": metrics.classification, "regression": metrics.regression, "multilabel": metrics.multilabel}[y.task](
        values, labels
    )


HEADLINE = {"classes": "accuracy", "regression": "rmse", "multilabel": "accuracy"}


def better(task: str, ours: float, theirs: float) -> bool:
    """Whether the first headline figure beats the second."""
    return ours < theirs if HEADLINE[task] == "rmse" else ours > theirs
