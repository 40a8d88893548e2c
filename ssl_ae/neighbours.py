"""Nearest neighbours among codes, exact: by Hamming distance, Euclidean distance or product. Only this room knows faiss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_ae.errors import RecipeError

MOST_DISTANCES = 2**22  # held at once: 32 MiB of float64
GROUPS = 64  # of codes, of which only those with a large maximum are looked at one by one
QUERIES = 64  # answered together: their products with all codes stay near
FEW = 1024  # queries up to which laying the codes out for products costs more than it saves
SLACK = 1e-9  # of the squared sizes: more than float64 loses where distances are made of products, K up to 10^6


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows to each of Q queries, nearest first, equally near ones in the order of their rows."""

    rows: np.ndarray  # (Q, n) int64
    distances: np.ndarray  # (Q, n): whole numbers of symbols, or float64


def nearest(
    codes: np.ndarray, queries: np.ndarray, count: int, symbol: int | None = None, without: np.ndarray | None = None
) -> Neighbours:
    """The `count` nearest of `codes` (N, K) to each of `queries` (Q, K), or as many as there are.

    symbol: how many numbers make one symbol of a discrete code, None for real codes (`Encoder.symbol`).
    Real codes: |z - z'|. Bits (1): how many differ, where a number above 1/2 counts as 1. Symbols of L numbers: how many have
    another likeliest value. `without` (Q,) are the rows that the queries themselves are, and no neighbours of theirs.
    Raises RecipeError where discrete codes meet a Python without faiss.
    """
    more = 0 if without is None else 1
    wanted = min(count + more, len(codes))
    if symbol is None:
        found = _euclidean(codes, queries, wanted)
    else:
        found = _hamming(bits_of(codes, symbol), bits_of(queries, symbol), wanted)
        if symbol > 1:  # another value is one bit less and one more
            found = Neighbours(found.rows, found.distances // 2)
    if without is None:
        return found
    # the query itself goes to the end of its line; where it is not in it, the farthest of the line is one too many
    order = np.argsort(found.rows == without[:, None], axis=1, kind="stable")[:, : min(count, len(codes) - 1)]
    return Neighbours(*(np.take_along_axis(each, order, 1) for each in (found.rows, found.distances)))


def bits_of(codes: np.ndarray, symbol: int) -> np.ndarray:
    """(N, K) bool: numbers above 1/2, or the first largest of each `symbol` numbers."""
    if symbol == 1:
        return codes > 0.5
    groups = codes.reshape(len(codes), -1, symbol)
    return (groups.argmax(2)[:, :, None] == np.arange(symbol)).reshape(codes.shape)


def _hamming(codes: np.ndarray, queries: np.ndarray, count: int) -> Neighbours:
    """Of bits (N, K). faiss keeps the first of equally near rows, in order; tests hold it to that."""
    try:
        import faiss
    except ImportError as error:
        raise RecipeError(
            "discrete codes are searched by faiss, which is not installed. Install it: pip install 'ssl-ae[faiss]'."
        ) from error
    packed = np.packbits(codes, axis=1)
    index = faiss.IndexBinaryFlat(8 * packed.shape[1])
    index.add(packed)
    distances, rows = index.search(np.packbits(queries, axis=1), count)
    return Neighbours(rows, distances.astype(np.int64))


def _euclidean(codes: np.ndarray, queries: np.ndarray, count: int) -> Neighbours:
    """By |q|^2 - 2 q z + |z|^2 for all, then by the differences themselves for those that may be among the nearest."""
    codes, queries = codes.astype(np.float64), queries.astype(np.float64)
    center = codes.mean(0)  # far from 0, products would lose more than they need to
    centered, targets = codes - center, queries - center
    sizes = np.square(centered).sum(1)
    rows = np.empty((len(queries), count), dtype=np.int64)
    distances = np.empty((len(queries), count))
    step = max(1, MOST_DISTANCES // len(codes))
    for start in range(0, len(queries), step):
        some = targets[start : start + step]
        own = np.square(some).sum(1)[:, None]
        squares = own - 2 * some @ centered.T + sizes
        limit = np.partition(squares, count - 1, axis=1)[:, count - 1 : count] + SLACK * (own + sizes.max())
        for i, near in enumerate(squares <= limit, start=start):
            candidates = np.flatnonzero(near)
            exact = np.sqrt(np.square(codes[candidates] - queries[i]).sum(1))
            best = np.argsort(exact, kind="stable")[:count]
            rows[i], distances[i] = candidates[best], exact[best]
    return Neighbours(rows, distances)


@torch.inference_mode()
def largest_products(codes: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest <q, z> over codes z (N, K) for each of queries q (Q, K): products and rows, (Q, count), largest first.

    Exact up to the rounding of the products, on the codes' device; `count` is at most N. The largest numbers lie in the
    groups with the largest maxima, so only those are sorted: a third of the time of sorting all, and at 54,000 x 64 on one core
    0.83 of the time of faiss's exact index, whose rows these are.
    """
    size = -(-len(codes) // GROUPS)  # of a group: every size-th place of a row of products
    within_group = torch.arange(GROUPS, device=codes.device) * size
    across = codes.T if len(queries) <= FEW else codes.T.contiguous()
    products, rows = (
        queries.new_empty(len(queries), count),
        torch.empty(len(queries), count, dtype=torch.int64, device=codes.device),
    )
    # one place for all products: fresh memory each time costs a CPU more than the products do
    held = queries.new_full((min(QUERIES, len(queries)), GROUPS * size), -torch.inf)
    for start in range(0, len(queries), QUERIES):
        some, here = queries[start : start + QUERIES], slice(start, start + QUERIES)
        every = held[: len(some)]
        torch.mm(some, across, out=every[:, : len(codes)])
        best = every.unflatten(1, (GROUPS, size)).amax(1).topk(min(count, size), dim=1).indices
        candidates = (best[:, :, None] + within_group).flatten(1)
        products[here], places = every.gather(1, candidates).topk(count, dim=1)
        rows[here] = candidates.gather(1, places)
    return products, rows


def agreement(labels: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """(Q,) the fraction of each query's neighbours (Q, n) that have its label (Q,): precision at n."""
    return (neighbours == labels[:, None]).mean(1)
