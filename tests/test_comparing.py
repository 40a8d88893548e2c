"""Paired comparison: against the formulas by hand and scipy's own test of the differences against 0."""

import numpy as np
import pytest
from scipy import stats

from ssl_ae.comparing import paired


def test_against_the_one_sample_test_of_the_differences():
    random = np.random.default_rng(0)
    theirs = random.uniform(0.5, 0.9, 11)
    ours = theirs + random.normal(0.02, 0.03, 11)
    found = paired(ours, theirs)
    differences = ours - theirs
    assert (found.pairs, found.mean) == (11, pytest.approx(differences.mean()))
    assert found.sd == pytest.approx(np.sqrt(np.square(differences - differences.mean()).sum() / 10))
    assert found.standard_error == pytest.approx(found.sd / np.sqrt(11))
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue)


def test_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, whose tail is 1 - t / sqrt(t^2 + 2)."""
    t = 2 * np.sqrt(3)
    found = paired([5.0, 7.0, 9.0], [4.0, 5.0, 6.0])
    assert (found.mean, found.sd, found.standard_error) == pytest.approx((2.0, 1.0, 1 / np.sqrt(3)))
    assert found.p == pytest.approx(1 - t / np.sqrt(t**2 + 2))


def test_one_pair_knows_no_deviation():
    found = paired([0.7], [0.9])
    assert found.mean == pytest.approx(-0.2)
    assert np.isnan([found.sd, found.standard_error, found.p]).all()


@pytest.mark.parametrize(("lead", "p"), [(0.0, 1.0), (0.1, 0.0)])
def test_the_same_difference_every_time(lead, p):
    theirs = np.array([0.3, 0.5, 0.8])
    found = paired(theirs + lead, theirs)
    assert (found.sd, found.p) == (0.0, p)
    assert found.mean == pytest.approx(lead)


def test_nothing_to_compare_is_the_callers_mistake():
    with pytest.raises(ValueError, match="no pair"):
        paired([], [])
    with pytest.raises(ValueError, match="broadcast"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
