"""Figures of merit against scikit-learn and counts by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from ssl_ae.metrics import calibration_error, classification, multilabel, regression

RANDOM = np.random.default_rng(0)


def test_classification_is_scikit_learns():
    p = RANDOM.dirichlet(np.ones(5), size=97)
    y = RANDOM.integers(5, size=97)
    found = classification(p, y)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    assert found["error"] == pytest.approx(1 - found["accuracy"])
    assert found["nll"] == pytest.approx(sk.log_loss(y, p, labels=range(5)))


def test_rows_without_a_label_do_not_count():
    p, y = RANDOM.dirichlet(np.ones(3), size=31), RANDOM.integers(3, size=31)
    partly = np.where(np.arange(31) % 3 == 0, -1, y)
    assert classification(p, partly) == pytest.approx(classification(p[partly >= 0], y[partly >= 0]))
    assert classification(p, np.full(31, -1)) == {}


def test_an_impossible_class_that_happened_has_infinite_nll():
    assert classification(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([0, 1]))["nll"] == np.inf


def test_calibration_error_by_hand():
    """Two bins. Lower: 0.4 and 0.5, one right, |1/2 - 0.45| 2/5; upper: 0.6, 0.9 and 1.0, all right, |1 - 2.5/3| 3/5."""
    confidence, right = np.array([0.4, 0.5, 0.6, 0.9, 1.0]), np.array([True, False, True, True, True])
    assert calibration_error(confidence, right, bins=2) == pytest.approx(0.05 * 2 / 5 + (1 - 2.5 / 3) * 3 / 5)


def test_a_calibrated_predictor_has_little_calibration_error():
    """Labels drawn from p itself; 15 bins of about n / 15 rows, each off by at most about sqrt(15 / n) / 2."""
    n = 60_000
    p = RANDOM.dirichlet(np.ones(3), size=n)
    y = (p.cumsum(1) < RANDOM.random((n, 1))).sum(1)
    assert classification(p, y)["ece"] < 0.5 * (15 / n) ** 0.5
    assert classification(p**3 / (p**3).sum(1, keepdims=True), y)["ece"] > 0.05


def test_regression_is_scikit_learns():
    y = RANDOM.normal(size=(37, 3)) * [1, 10, 100]
    guess = y + RANDOM.normal(size=y.shape)
    found = regression(guess, y)
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(y.ravel(), guess.ravel()))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, guess))
    assert found["r2"] == pytest.approx(sk.r2_score(y, guess))


def test_unknown_targets_do_not_count():
    y = RANDOM.normal(size=(37, 2))
    guess = y + 0.3 * RANDOM.normal(size=y.shape)
    partly = y.copy()
    partly[::4, 0] = partly[5:, 1] = np.nan
    found, there = regression(guess, partly), ~np.isnan(partly)
    assert found["rmse"] == pytest.approx(np.sqrt(((guess - y)[there] ** 2).mean()))
    each = [sk.r2_score(y[there[:, t], t], guess[there[:, t], t]) for t in range(2)]
    assert found["r2"] == pytest.approx(np.mean(each))
    assert regression(guess, np.full_like(y, np.nan)) == {}


def test_multilabel_counts_answers():
    y = RANDOM.integers(2, size=(29, 3)).astype(float)
    p = np.clip(RANDOM.random(y.shape), 0.01, 0.99)
    y[::5, 1] = np.nan
    there = ~np.isnan(y)
    found = multilabel(p, y)
    assert found["accuracy"] == pytest.approx(((p > 0.5) == y)[there].mean())
    assert found["nll"] == pytest.approx(-(np.log(np.where(y == 1, p, 1 - p))[there]).mean())
    assert multilabel(p, np.full_like(y, np.nan)) == {}
