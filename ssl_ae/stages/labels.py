"""Which labels training may look at: the recipe's budget, a file, or all; and the same for everyone who compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_ae import files
from ssl_ae.data.labels import aligned, draw
from ssl_ae.errors import DataError
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import UNLABELED


@dataclass(frozen=True)
class Labels:
    """Labels of the train split that a run may use."""

    y: np.ndarray  # (N,) int64 with -1, or (N, T) float32 with NaN
    weight: np.ndarray | None  # (N,) weight in l_Y

    @property
    def known(self) -> np.ndarray:
        """(N,) bool."""
        return self.y != UNLABELED if self.y.ndim == 1 else ~np.isnan(self.y).all(1)

    @property
    def count(self) -> int:
        return int(self.known.sum())

    @property
    def digest(self) -> str:
        """sha256 of who has which label."""
        weight = [] if self.weight is None else self.weight[self.known].tolist()
        return files.digest([np.flatnonzero(self.known).tolist(), self.y[self.known].tolist(), weight])


def labels_of(ws: Workspace) -> Labels:
    """Raises DataError where there is no label at all, and where the budget asks for more than there are."""
    budget, data = ws.recipe.data.labels, ws.data
    weight = None
    if isinstance(budget, str) and budget != "all":
        table = data.read_labels(Path(budget))
        keys = data.split("train").keys
        y = aligned(table, keys)
        if table.weight is not None:
            weight = np.ones(len(keys), np.float32)
            weight_of = dict(zip(table.keys, table.weight, strict=True))
            weight[:] = [weight_of.get(key, 1.0) for key in keys]
        found = Labels(y, weight)
    else:
        y = data.labels("train")
        found = Labels(y, None)
        if budget != "all" and found.count:
            chosen = draw(
                y,
                data.split("train").keys,
                names=ws.card.y.names,
                seed=budget.seed,
                total=budget.total,
                per_class=budget.per_class,
            )
            unknown = UNLABELED if y.ndim == 1 else np.nan
            found = Labels(np.where(chosen if y.ndim == 1 else chosen[:, None], y, unknown).astype(y.dtype), None)
    if found.count == 0:
        raise DataError(
            f"no row of the train split of {data.path} has a label, and finetune needs some. "
            "Name a file with columns key and label: --labels FILE."
        )
    return found
