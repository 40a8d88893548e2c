"""Which samples to label first: rows of a table of codes, without looking at what nobody knows yet."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

CANDIDATES = 10  # uncertain rows for each that is chosen: enough to be unlike each other, few enough to be uncertain
STEPS = 50  # of k-means


def typical(z: np.ndarray, count: int, labeled: np.ndarray, seed: int = 0) -> np.ndarray:
    """`count` rows of codes z (N, K) that are typical of parts of them where no label is yet, largest part first.

    Clusters by k-means, one for each label there is and each that is wanted (Hacohen et al. 2022, sec. 3.3); of the largest
    clusters without a label, the row nearest to the mean, which is the medoid of k-means. `labeled` (N,) bool are no choice.
    """
    free = np.flatnonzero(~labeled)
    if count >= len(free):
        return free
    parts = min(count + int(labeled.sum()), len(z))
    clusters = clusters_of(z, parts, seed)
    taken = np.unique(clusters.labels_[labeled])
    sizes = np.bincount(clusters.labels_, minlength=len(clusters.cluster_centers_))
    sizes[taken] = 0
    wanted = [part for part in np.argsort(-sizes, kind="stable")[:count] if sizes[part]]
    distances = np.linalg.norm(z - clusters.cluster_centers_[clusters.labels_], axis=1)
    chosen = [_nearest(distances, clusters.labels_ == part) for part in wanted]
    return _filled_up(np.array(chosen, dtype=np.int64), free, distances, count)


def uncertain(z: np.ndarray, p: np.ndarray, count: int, labeled: np.ndarray, seed: int = 0) -> np.ndarray:
    """`count` rows that a classifier is least sure of and that are unlike each other, least sure first.

    By margin, the probability p (N, C) of the likeliest class less that of the second (Scheffer et al. 2001): the rows of the
    smallest margins, `CANDIDATES` for each that is wanted, fall into clusters by their codes z (N, K), and the least sure of
    each cluster is chosen (Zhdanov 2019).
    """
    free = np.flatnonzero(~labeled)
    if count >= len(free):
        return free
    margin = margins(p)
    candidates = free[np.argsort(margin[free], kind="stable")[: CANDIDATES * count]]
    parts = clusters_of(z[candidates], min(count, len(candidates)), seed).labels_
    chosen = [candidates[_nearest(margin[candidates], parts == part)] for part in np.unique(parts)]
    filled = _filled_up(np.array(chosen, dtype=np.int64), free, margin, count)
    return filled[np.argsort(margin[filled], kind="stable")]


def margins(p: np.ndarray) -> np.ndarray:
    """(N,) probability of the likeliest class less that of the second, p (N, C); a class by itself has no second."""
    second, first = np.partition(np.pad(p, ((0, 0), (1, 0))), -2, axis=1)[:, -2:].T
    return first - second


def clusters_of(z: np.ndarray, parts: int, seed: int) -> KMeans:
    parts = min(parts, len(np.unique(z, axis=0)))
    return KMeans(parts, n_init=1, max_iter=STEPS, random_state=seed).fit(z)


def _nearest(distances: np.ndarray, among: np.ndarray) -> int:
    return int(np.flatnonzero(among)[distances[among].argmin()])


def _filled_up(chosen: np.ndarray, free: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Where samples repeat there are fewer clusters than asked for: the rows that come next by `order` (N,) join."""
    rest = np.setdiff1d(free, chosen)
    return np.concatenate([chosen, rest[np.argsort(order[rest], kind="stable")][: count - len(chosen)]])
