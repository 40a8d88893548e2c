"""Whether one method is better than another, by what both made of the same draws of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-12  # of figures of the order of 1
SURE = 0.05  # two-sided p below which a difference is called more than chance


@dataclass(frozen=True)
class Paired:
    """Of n differences ours - theirs, one a draw of labels. What needs more pairs than there are is NaN."""

    pairs: int
    mean: float
    sd: float  # of the differences, with n - 1
    standard_error: float  # of their mean
    p: float  # two-sided, of the paired t-test (Student 1908); 1 where every difference is 0


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Figures of the same draws, in the same order. Raises ValueError where there is none, or not equally many."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    count = len(differences)
    if not count:
        raise ValueError("paired was given no pair")
    mean = float(differences.mean())
    if count == 1:
        return Paired(1, mean, np.nan, np.nan, np.nan)
    sd = float(differences.std(ddof=1))
    if sd <= ROUNDING:  # t is 0/0 or without bound
        return Paired(count, mean, 0.0, 0.0, 1.0 if abs(mean) <= ROUNDING else 0.0)
    from scipy import stats  # a third of a second, which only those who compare should wait for

    return Paired(count, mean, sd, sd / count**0.5, float(stats.ttest_rel(ours, theirs).pvalue))
