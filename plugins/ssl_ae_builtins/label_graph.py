"""The graph that labels spread over: which rows are near, how near they are, and how much each of them has to say."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ssl_ae.neighbours import largest_products

LEAST_SIMILARITY = 1e-6  # where nothing is near, all are equally far
LEAST_WEIGHT = 1e-18  # of an edge, beside edges of at most 1: degrees and their products stay numbers in float32

T = TypeVar("T")


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


def nearest(codes: Tensor, z: Tensor, metric: str, k: int) -> tuple[Tensor, Tensor]:
    """Products with, and rows of, the k nearest of `codes` (N, J) to each of z (B, K), (B, k), or as many as there are."""
    return largest_products(codes, METRICS[metric].queries(z), min(k, len(codes)))


def weights(products: Tensor, z: Tensor, metric: str, power: float) -> Tensor:
    """Of what is near to z (B, K) by its products (B, k), the largest first: (B, k), in (0, 1]."""
    return powered(METRICS[metric].similarity(products, z), power)


def powered(similarity: Tensor, power: float) -> Tensor:
    """similarity^power, in (0, 1]."""
    return (similarity.clamp(min=LEAST_SIMILARITY) ** power).clamp(min=LEAST_WEIGHT)


class Memory:
    """What a process remembers of vectors: many draws of labels on the same latents wait for their neighbours once."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, {}

    def __call__(self, make: Callable[[], T], vectors: Sequence[Tensor], *how: object) -> T:
        """What `make` gives for these vectors, or gave when it was asked for them in this way; the oldest is forgotten."""
        key = (*((each.device, hashlib.sha256(each.contiguous().cpu().numpy()).hexdigest()) for each in vectors), *how)
        self.held[key] = found = self.held.pop(key) if key in self.held else make()
        while len(self.held) > self.most:
            del self.held[next(iter(self.held))]
        return found


GRAPHS, NEAR = Memory(3), Memory(7)  # lists of neighbours are smaller, and all of both metrics serve every k


def graph_of(z: Tensor, metric: str, k: int, power: float, most: int) -> Tensor:
    """S of the graph of centred latents (N, K) and their k nearest, remembered, as are the `most` that any k may ask for."""

    def make() -> Tensor:
        products, near = NEAR(lambda: nearest_others(z, metric, most), [z], metric, most)
        return joined(products[:, :k], near[:, :k], z, metric, power)

    return GRAPHS(make, [z], metric, k, power)


def joined(products: Tensor, near: Tensor, z: Tensor, metric: str, power: float) -> Tensor:
    """S of the graph of centred latents (N, K) and those near to them (N, k), sparse (N, N)."""
    return symmetric(weights(products, z, metric, power), near)


def nearest_others(z: Tensor, metric: str, k: int) -> tuple[Tensor, Tensor]:
    """Products with, and rows of, the k nearest to each of z (N, K) but itself, (N, k), or as many as there are."""
    products, near = nearest(METRICS[metric].codes(z), z, metric, k + 1)
    other = near != torch.arange(len(z), device=z.device)[:, None]
    other[other.all(1), -1] = False  # a row that is not among the nearest to itself has too many twins
    return products[other].view(len(z), -1), near[other].view(len(z), -1)


def symmetric(weight: Tensor, near: Tensor) -> Tensor:
    """S = D^-1/2 (A + A') D^-1/2 with A_ij the weight of row j among those near to i, both (N, k): sparse (N, N), symmetric,
    with eigenvalues from -1 to 1."""
    rows = len(near)
    start = torch.arange(rows, device=near.device)[:, None].expand_as(near).flatten()
    end, weight = near.flatten(), weight.flatten()
    both = torch.stack([torch.cat([start, end]), torch.cat([end, start])])
    degree = weight.new_zeros(rows).index_add_(0, both[0], weight.repeat(2))
    scaled = weight.repeat(2) / (degree[both[0]] * degree[both[1]]).sqrt()
    with quiet():
        return torch.sparse_coo_tensor(both, scaled, (rows, rows), check_invariants=False).coalesce().to_sparse_csr()


def mean(one: Tensor, other: Tensor) -> Tensor:
    """(S + S') / 2 of two graphs of the same rows, sparse (N, N)."""
    with quiet():
        return (one + other) * 0.5


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that this format is young."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ")
        yield
