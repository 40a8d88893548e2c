"""Random forests grown by scikit-learn and kept as tensors: no pickle, and predictions where the features are."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Categorical, Distribution

import ssl_ae


class Forest(ssl_ae.TableHead):
    """Random forest (Breiman 2001) on the labelled rows; p = (sum of the trees' shares + 1/C) / (trees + 1).

    So no class is impossible, and the likeliest one is scikit-learn's. Trees are grown to their end, with sqrt(features) tried
    at each node and bootstrapped rows, as by scikit-learn's defaults. Each node of all trees has a place in one table.
    """

    name = "forest"

    class Config(ssl_ae.Config):
        trees: int = Field(100, ge=1, description="trees that vote")
        seed: int = Field(0, ge=0, description="of the rows and features that each tree sees")

    def fit(self, z: Tensor, y: Tensor) -> None:
        """z (N, K), y (N,) with UNLABELED = -1; classes without a label get next to no probability."""
        from sklearn.ensemble import RandomForestClassifier

        known = y != ssl_ae.UNLABELED
        forest = RandomForestClassifier(self.config.trees, random_state=self.config.seed)
        self._keep(forest.fit(z[known].numpy(), y[known].numpy()))

    def predict(self, z: Tensor) -> Distribution:
        """(B, K) -> Categorical, (B,)."""
        return Categorical(probs=self._mean(self.shares[self.leaves(z)], torch.ones(len(self.roots))), validate_args=False)

    def held_out(self, z: Tensor, y: Tensor, folds: Tensor) -> Tensor:
        """Probabilities of labelled rows by the trees that have not seen them, (R, L, C) (out of bag, Breiman 2001, sec. 3.1).

        A tree draws as many rows as `folds` (R, L) leave to the others, and there are twice as many trees, so that about as
        many vote on a row as in the forest itself. The fit of `R * folds` forests would tell the same in ten times the time.
        """
        from sklearn.ensemble import RandomForestClassifier

        known = y != ssl_ae.UNLABELED
        z, y = z[known], y[known]
        share = 1 - 1 / len(folds.unique())
        forest = RandomForestClassifier(2 * self.config.trees, random_state=self.config.seed, max_samples=share)
        self._keep(forest.fit(z.numpy(), y.numpy()))
        unseen = torch.ones(len(z), len(self.roots))
        for tree, rows in enumerate(forest.estimators_samples_):
            unseen[rows, tree] = 0
        return self._mean(self.shares[self.leaves(z)], unseen).expand(len(folds), -1, -1)

    def _keep(self, forest) -> None:
        for name, value in as_tensors(forest, self.shapes.classes).items():
            self.keep(name, value)

    def _mean(self, shares: Tensor, votes: Tensor) -> Tensor:
        """(B, C) of the trees' shares (B, trees, C), each counted `votes` (B, trees) times."""
        votes = votes.to(shares).expand(shares.shape[:2])
        return (torch.einsum("bt,btc->bc", votes, shares) + 1 / shares.shape[2]) / (votes.sum(1, keepdim=True) + 1)

    def leaves(self, z: Tensor) -> Tensor:
        """(B, trees) the node in which each row ends."""
        node = self.roots.expand(len(z), -1)
        for _ in range(int(self.depth)):
            goes_left = z.gather(1, self.feature[node]) <= self.threshold[node]
            node = torch.where(goes_left, self.left[node], self.right[node])
        return node


def as_tensors(forest, classes: int) -> dict[str, Tensor]:
    """A fitted RandomForestClassifier as node tables: left, right (M,) int64, feature (M,), threshold (M,), shares (M, C).

    A leaf is its own child. scikit-learn compares float32 features with float64 thresholds: x <= t holds for the same x as
    x <= t', t' the largest float32 that is not above t.
    """
    trees = [each.tree_ for each in forest.estimators_]
    roots = np.cumsum([0, *(tree.node_count for tree in trees)])
    itself = np.arange(roots[-1])
    children = {}
    for side in ("left", "right"):
        own = np.concatenate([getattr(tree, f"children_{side}") for tree in trees])
        children[side] = np.where(own < 0, itself, own + np.repeat(roots[:-1], np.diff(roots)))
    shares = np.zeros((roots[-1], classes), np.float32)
    shares[:, forest.classes_] = np.concatenate([tree.value[:, 0, :] for tree in trees])
    tables = {
        **children,
        "feature": np.concatenate([tree.feature for tree in trees]).clip(min=0),
        "threshold": floored(np.concatenate([tree.threshold for tree in trees])),
        "shares": shares,
        "roots": roots[:-1],
        "depth": np.array(max(tree.max_depth for tree in trees)),
    }
    return {name: torch.from_numpy(value) for name, value in tables.items()}


def floored(threshold: np.ndarray) -> np.ndarray:
    """The largest float32 at or below each float64."""
    nearest = threshold.astype(np.float32)
    return np.where(nearest > threshold, np.nextafter(nearest, np.float32(-np.inf)), nearest)
