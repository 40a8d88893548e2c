"""Which rows are worth a label: clusters whose means are known, margins written out."""

import numpy as np
import pytest

from ssl_ae.choosing import margins, typical, uncertain

K = 5


def heaps(sizes, seed=0, spread=0.1):
    """Clusters far apart with a row exactly at each mean, which is the last of its cluster."""
    random = np.random.default_rng(seed)
    z, part = [], []
    for number, size in enumerate(sizes):
        mean = np.zeros(K)
        mean[number % K] = 10.0 * (1 + number // K)
        noise = random.normal(0, spread, (size - 1, K))
        z += [mean + noise - noise.mean(0), mean[None]]
        part += [number] * size
    return np.concatenate(z), np.array(part)


def test_typical_rows_are_the_middles_largest_first():
    z, part = heaps([13, 41, 7, 29])
    rows = typical(z, 4, np.zeros(len(z), bool))
    assert part[rows].tolist() == [1, 3, 0, 2]
    assert rows.tolist() == [np.flatnonzero(part == number)[-1] for number in (1, 3, 0, 2)]


def test_what_has_a_label_is_covered():
    z, part = heaps([13, 41, 7, 29])
    labeled = np.zeros(len(z), bool)
    labeled[[np.flatnonzero(part == 1)[0], np.flatnonzero(part == 2)[0]]] = True
    rows = typical(z, 2, labeled)
    assert sorted(part[rows]) == [0, 3]


@pytest.mark.parametrize("count", [1, 5, 17, 30, 100])
def test_as_many_as_asked_for_and_none_twice(count):
    """Also where rows repeat, so that k-means has fewer clusters than it was asked for."""
    z = np.repeat(np.eye(K)[:3], 11, axis=0)
    labeled = np.arange(33) % 5 == 0
    p = np.full((33, 2), 0.5)
    for rows in (typical(z, count, labeled), uncertain(z, p, count, labeled)):
        assert len(set(rows.tolist())) == len(rows) == min(count, int((~labeled).sum()))
        assert not labeled[rows].any()


def test_margins_are_of_the_two_likeliest():
    p = np.random.default_rng(0).dirichlet(np.ones(7), 31)
    ordered = np.sort(p, axis=1)
    np.testing.assert_allclose(margins(p), ordered[:, -1] - ordered[:, -2])
    np.testing.assert_array_equal(margins(np.ones((3, 1))), 1.0)  # a class by itself leaves no doubt


def test_uncertain_rows_are_unlike_each_other():
    """Of three heaps that are equally unsure, with a hundred sure rows beside them, each gives its least sure row."""
    z, part = heaps([7, 7, 6, 97])
    p = np.full(len(z), 0.99)
    p[part < 3] = 0.6
    least = np.array([np.flatnonzero(part == number)[2] for number in range(3)])
    p[least] = [0.52, 0.51, 0.53]
    rows = uncertain(z, np.stack([p, 1 - p], 1), 3, np.zeros(len(z), bool))
    assert rows.tolist() == least[[1, 0, 2]].tolist()
