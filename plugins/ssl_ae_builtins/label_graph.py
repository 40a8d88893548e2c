"""The graph that labels spread over: which rows are near, how near they are, and how much each of them has to say."""

from __future__ import annotations

import hashlib
import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ssl_ae.neighbours import largest_products

LEAST_SIMILARITY = 1e-6  # where nothing is near, all are equally far
LEAST_WEIGHT = 1e-18  # of an edge, beside edges of at most 1: degrees and their products stay numbers in float32
GRAPHS = 2  # that a process remembers: who fits many draws of labels to the same latents waits for their neighbours once


class Metric(Protocol):
    """Nearness as a product of vectors: the nearest of rows `codes(z)` to `queries(z)` are those of the largest products."""

    @staticmethod
    def codes(z: Tensor) -> Tensor:
        """(N, K) centred latents -> (N, J)."""

    @staticmethod
    def queries(z: Tensor) -> Tensor:
        """(B, K) -> (B, J)."""

    @staticmethod
    def similarity(products: Tensor, z: Tensor) -> Tensor:
        """The largest products (B, k) of z (B, K), the largest first -> similarities up to 1."""


class Cosine:
    """cos(z, z')."""

    @staticmethod
    def codes(z: Tensor) -> Tensor:
        return normalize(z, dim=1)

    queries = codes

    @staticmethod
    def similarity(products: Tensor, z: Tensor) -> Tensor:
        return products


class Euclidean:
    """exp(-|z - z'|^2 / s^2), s the distance of the farthest neighbour (a local scale: Zelnik-Manor & Perona 2004)."""

    @staticmethod
    def codes(z: Tensor) -> Tensor:
        """z and -|z|^2 / 2, whose product with (q, 1) is (|q|^2 - |q - z|^2) / 2."""
        return torch.cat([z, -z.square().sum(1, keepdim=True) / 2], dim=1)

    @staticmethod
    def queries(z: Tensor) -> Tensor:
        return pad(z, (0, 1), value=1.0)

    @staticmethod
    def similarity(products: Tensor, z: Tensor) -> Tensor:
        squares = (z.square().sum(1, keepdim=True) - 2 * products).clamp(min=0)
        return torch.exp(-squares / squares.amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny))


METRICS: dict[str, type[Metric]] = {"cosine": Cosine, "euclidean": Euclidean}


def nearest(codes: Tensor, z: Tensor, metric: str, k: int, power: float) -> tuple[Tensor, Tensor]:
    """Weights in (0, 1] and rows of the k nearest of `codes` (N, J) to each of z (B, K), (B, k), or as many as there are."""
    measure = METRICS[metric]
    products, rows = largest_products(codes, measure.queries(z), min(k, len(codes)))
    similarity = measure.similarity(products, z).clamp(min=LEAST_SIMILARITY)
    return (similarity**power).clamp(min=LEAST_WEIGHT), rows


_graphs: dict[tuple[str, str, int, float], Tensor] = {}


def graph_of(z: Tensor, metric: str, k: int, power: float) -> Tensor:
    """`joined`, from memory where it was asked for these vectors before."""
    key = (hashlib.sha256(z.cpu().numpy()).hexdigest(), metric, k, power)
    if key not in _graphs:
        graph = joined(z, metric, k, power)
        for oldest in [*_graphs][: len(_graphs) - GRAPHS + 1]:
            del _graphs[oldest]
        _graphs[key] = graph
    return _graphs[key]


def joined(z: Tensor, metric: str, k: int, power: float) -> Tensor:
    """S of the graph of centred latents (N, K), sparse (N, N): symmetric, with eigenvalues from -1 to 1."""
    rows = len(z)
    weight, near = nearest(METRICS[metric].codes(z), z, metric, k + 1, power)
    other = near != torch.arange(rows)[:, None]
    other[other.all(1), -1] = False  # a row that is not among the nearest to itself has too many twins
    start = torch.arange(rows)[:, None].expand_as(near)[other]
    end, weight = near[other], weight[other]
    both = torch.stack([torch.cat([start, end]), torch.cat([end, start])])
    degree = torch.zeros(rows).index_add_(0, both[0], weight.repeat(2))
    scaled = weight.repeat(2) / (degree[both[0]] * degree[both[1]]).sqrt()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ")  # that torch calls this format young
        return torch.sparse_coo_tensor(both, scaled, (rows, rows), check_invariants=False).coalesce().to_sparse_csr()
