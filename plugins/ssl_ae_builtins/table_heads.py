"""Heads fitted at once on the table of stored latents, by scikit-learn."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Categorical, Distribution

import ssl_ae


class Logistic(ssl_ae.TableHead):
    """Logistic regression with L2 penalty on standardised latents, fitted to its optimum (Cox 1958; by L-BFGS, scikit-learn)."""

    name = "logistic"

    class Config(ssl_ae.Config):
        C: float = Field(1.0, gt=0, description="inverse of the penalty's strength, as in scikit-learn")
        max_iter: int = Field(1000, ge=1, description="iterations of L-BFGS at most")

    def fit(self, z: Tensor, y: Tensor) -> None:
        """z (N, K), y (N,) with UNLABELED = -1; classes without a label get probability 0."""
        from sklearn.linear_model import LogisticRegression

        known = y != ssl_ae.UNLABELED
        z, y = z[known].double(), y[known]
        mean, std = z.mean(0), z.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        weight = torch.zeros(self.shapes.classes, z.shape[1], dtype=torch.float64)
        bias = torch.full((self.shapes.classes,), -torch.inf, dtype=torch.float64)
        seen = torch.unique(y)
        if len(seen) == 1:
            bias[seen] = 0.0
        else:
            model = LogisticRegression(C=self.config.C, max_iter=self.config.max_iter).fit(((z - mean) / std).numpy(), y.numpy())
            coef, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
            if len(seen) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
                coef, intercept = torch.cat([torch.zeros_like(coef), coef]), torch.cat([torch.zeros_like(intercept), intercept])
            weight[seen], bias[seen] = coef / std, intercept - (coef / std) @ mean
        self.keep("weight", weight.float())
        self.keep("bias", bias.float())

    def predict(self, z: Tensor) -> Distribution:
        """(B, K) -> Categorical, (B,)."""
        return Categorical(logits=z @ self.weight.T + self.bias, validate_args=False)


class Knn(ssl_ae.TableHead):
    """Vote of the k nearest labelled latents; p = (votes + 1/C) / (k + 1), so that no class is impossible (Cover & Hart 1967)."""

    name = "knn"

    class Config(ssl_ae.Config):
        k: int = Field(5, ge=1, description="neighbours that vote; all labelled rows where there are fewer")
        metric: Literal["euclidean", "cosine", "manhattan"] = Field("euclidean", description="distance between latents")

    def fit(self, z: Tensor, y: Tensor) -> None:
        """z (N, K), y (N,) with UNLABELED = -1."""
        known = y != ssl_ae.UNLABELED
        self.keep("z", z[known].float())
        self.keep("y", y[known])

    def predict(self, z: Tensor) -> Distribution:
        """(B, K) -> Categorical, (B,)."""
        neighbours = torch.from_numpy(self._neighbours().kneighbors(z.cpu().numpy(), return_distance=False))
        votes = torch.nn.functional.one_hot(self.y.cpu()[neighbours], self.shapes.classes).sum(1).float()
        votes = votes + 1.0 / self.shapes.classes
        return Categorical(probs=votes.to(z.device), validate_args=False)

    def _neighbours(self):
        from sklearn.neighbors import NearestNeighbors

        rows, index = getattr(self, "_index", (None, None))
        if rows is not self.z:  # the first prediction since the head was fitted or loaded
            k = min(self.config.k, len(self.y))
            index = NearestNeighbors(n_neighbors=k, metric=self.config.metric).fit(self.z.cpu().numpy())
            self._index = self.z, index
        return index
