"""Nearest neighbours against brute force written out in numpy: distances, rows, and the order of equally near ones."""

import builtins

import numpy as np
import pytest
import torch

from ssl_ae import neighbours
from ssl_ae.errors import RecipeError
from ssl_ae.neighbours import agreement, bits_of, largest_products, nearest

N, Q, K = 503, 11, 13


def codes(kind, seed=0, rows=N):
    """Codes with many that are equally far apart: few levels, few distinct rows, a third of them written twice."""
    rng = np.random.default_rng(seed)
    if kind == "real":
        z = rng.integers(-2, 3, (rows, K)).astype(np.float32) + np.float32(1000.5)  # far from 0
    elif kind == "bits":
        z = rng.random((rows, K)).astype(np.float32).round(1)  # probabilities; 0.5 is no 1
    else:
        z = rng.dirichlet(np.ones(3), (rows, 4)).astype(np.float32).reshape(rows, 12)
    z[rows // 3 : 2 * (rows // 3)] = z[: rows // 3]
    return z


SYMBOL = {"real": None, "bits": 1, "symbols": 3}


def brute_force(z, queries, kind):
    """(Q, N) distances."""
    if kind == "real":
        return np.sqrt(np.square(z[None].astype(float) - queries[:, None].astype(float)).sum(2))
    if kind == "bits":
        return ((z > 0.5)[None] != (queries > 0.5)[:, None]).sum(2)
    one, other = (each.reshape(len(each), 4, 3).argmax(2) for each in (z, queries))
    return (one[None] != other[:, None]).sum(2)


KINDS = pytest.mark.parametrize("kind", ["real", "bits", "symbols"])


@KINDS
@pytest.mark.parametrize("count", [1, 10, N])
def test_exact_and_in_order(kind, count):
    z, queries = codes(kind), codes(kind, seed=1, rows=Q)
    found = nearest(z, queries, count, SYMBOL[kind])
    distances = brute_force(z, queries, kind)
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]  # equally near: the first row first
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_array_equal(found.distances, np.take_along_axis(distances, order, 1))
    assert len(np.unique(distances[0])) < N / 4  # there were many of them


@KINDS
def test_the_query_is_not_its_own_neighbour(kind):
    """A row's twin is: it lies at distance 0, before or after the row itself."""
    z, own = codes(kind), np.array([2, 170, 400])
    found = nearest(z, z[own], 10, SYMBOL[kind], without=own)
    distances = brute_force(z, z[own], kind).astype(float)
    distances[np.arange(3), own] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found.rows, order)
    assert found.distances[0, 0] == found.distances[1, 0] == 0


@KINDS
def test_a_query_behind_many_twins(kind):
    """Row 20 of 21 equal rows is not among the first six; its neighbours are the first five all the same."""
    z = np.repeat(codes(kind, rows=3)[:1], 21, axis=0)
    found = nearest(z, z[20:], 5, SYMBOL[kind], without=np.array([20]))
    assert found.rows.tolist() == [[0, 1, 2, 3, 4]]
    assert not found.distances.any()


@KINDS
def test_no_more_than_there_are(kind):
    z = codes(kind, rows=5)
    assert nearest(z, z[:2], 99, SYMBOL[kind]).rows.shape == (2, 5)
    alone = nearest(z, z[:2], 99, SYMBOL[kind], without=np.arange(2))
    assert alone.rows.shape == (2, 4)
    assert 0 not in alone.rows[0]
    assert 1 not in alone.rows[1]


def test_many_queries_are_answered_in_parts(monkeypatch):
    z, queries = codes("real"), codes("real", seed=1, rows=Q)
    whole = nearest(z, queries, 10)
    monkeypatch.setattr(neighbours, "MOST_DISTANCES", 3 * N)
    parts = nearest(z, queries, 10)
    np.testing.assert_array_equal(parts.rows, whole.rows)
    np.testing.assert_array_equal(parts.distances, whole.distances)


def test_distances_hardly_apart_are_told_apart():
    """1e-6 apart at a size of 1e3: the products alone would lose it in float32."""
    z = np.array([[1000.0, 2e-6], [1000.0, 1e-6], [1000.0, 3e-6]])
    found = nearest(z, np.array([[1000.0, 0.0]]), 3)
    assert found.rows.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(found.distances[0], [1e-6, 2e-6, 3e-6], rtol=1e-9)


def test_bits():
    z = np.array([[0.0, 0.5, 0.51, 1.0, 0.2, 0.3]])
    assert bits_of(z, 1).astype(int).tolist() == [[0, 0, 1, 1, 0, 0]]
    assert bits_of(z, 3).astype(int).tolist() == [[0, 0, 1, 1, 0, 0]]
    assert bits_of(np.array([[0.5, 0.5, 0.1, 0.9]]), 2).astype(int).tolist() == [[1, 0, 0, 1]]


def test_agreement_is_precision():
    found = agreement(np.array([3, 5]), np.array([[3, 3, 1, 3], [1, 2, 3, -1]]))
    assert found.tolist() == [0.75, 0.0]  # by hand


def test_without_faiss_bits_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RecipeError, match=r"pip install 'ssl-ae\[faiss\]'"):
        nearest(codes("bits"), codes("bits", rows=Q), 3, 1)
    assert nearest(codes("real"), codes("real", rows=Q), 3).rows.shape == (Q, 3)


@pytest.mark.parametrize("rows", [7, 64, 503, 5003])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_largest_products_are_those_of_sorting_all(rows, count):
    z, queries = (torch.from_numpy(codes("real", seed, many)).float() - 1000 for seed, many in ((0, rows), (1, 131)))
    products, found = largest_products(z, queries, count)
    every = queries @ z.T
    torch.testing.assert_close(products, every.topk(count, dim=1).values)
    torch.testing.assert_close(every.gather(1, found), products)
    assert all(len(set(row)) == count for row in found.tolist())
