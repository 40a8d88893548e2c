"""Figures of merit of predictions, over the rows whose label is known."""

from __future__ import annotations

import numpy as np
from sklearn import metrics as sk

BINS = 15  # of the calibration error, as in Guo et al. 2017


def classification(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """probabilities (N, C), labels (N,) with -1 where unknown. `nll` in nats a row; `ece` as in Guo et al. 2017, eq. 3."""
    known = labels >= 0
    p, y = probabilities[known].astype(np.float64), labels[known]
    if not len(y):
        return {}
    right = p.argmax(1) == y
    with np.errstate(divide="ignore"):
        nll = -np.log(p[np.arange(len(y)), y]).mean()
    accuracy = float(right.mean())
    return {"accuracy": accuracy, "error": 1.0 - accuracy, "nll": float(nll), "ece": calibration_error(p.max(1), right)}


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: sum_b n_b / N |accuracy_b - confidence_b| over equally wide bins of confidence."""
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.abs(np.bincount(index, right, bins) - np.bincount(index, confidence, bins))
    return float(gaps.sum() / len(right))


def regression(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """predictions and targets (N, T), NaN where a target is unknown; over all known targets, r2 averaged over the T targets."""
    there = ~np.isnan(targets)
    if not there.any():
        return {}
    errors = (predictions - targets)[there]
    columns = [t for t in range(targets.shape[1]) if there[:, t].sum() > 1]
    r2 = [sk.r2_score(targets[there[:, t], t], predictions[there[:, t], t]) for t in columns]
    return {
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "mae": float(np.abs(errors).mean()),
        "r2": float(np.mean(r2)) if r2 else float("nan"),
    }


def multilabel(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """probabilities and targets (N, T), NaN where unknown: each known target counts as one yes-or-no answer."""
    there = ~np.isnan(targets)
    if not there.any():
        return {}
    p, y = probabilities[there].astype(np.float64), targets[there]
    accuracy = float(((p >= 0.5) == (y >= 0.5)).mean())
    return {"accuracy": accuracy, "error": 1.0 - accuracy, "nll": float(sk.log_loss(y >= 0.5, p, labels=[False, True]))}
