"""Rows and their labels between two rows: the network shall be linear where no sample is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

import ssl_ae


class Mixup(ssl_ae.Regularizer):
    """x <- lambda x_i + (1 - lambda) x_j and y likewise, lambda ~ Beta(alpha, alpha) (Zhang et al. 2018, eq. 1).

    Every row i draws its own lambda and a partner j (their code draws one lambda a batch). Rows with a label mix with rows that
    have one, the others among themselves: so l_Y has a target, `soft`, wherever a row counts in it. What l_X compares with is
    the mixture of the clean samples; noise acts on the mixture. Guesses of an earlier model mix as labels do. A row's weight
    in l_Y stays its own. A row that is the only one of its kind in the batch stays as it is.
    """

    name = "mixup"

    class Config(ssl_ae.Config):
        alpha: float = Field(0.2, gt=0, description="of Beta(alpha, alpha): small, one row prevails; 1: all mixtures alike")

    def transform(self, batch: ssl_ae.Batch, generator: torch.Generator) -> ssl_ae.Batch:
        alpha = batch.x.new_full((len(batch), 2), self.config.alpha)
        share = torch._sample_dirichlet(alpha, generator=generator)[:, 0]  # Beta(alpha, alpha), (B,): the public one takes none
        partner = partners(batch.labeled, generator)

        def mixed(value: Tensor) -> Tensor:
            part = share.view(-1, *[1] * (value.dim() - 1))
            return part * value + (1 - part) * value[partner]

        x = mixed(batch.x)
        target = x if batch.target is batch.x else mixed(batch.target)
        soft, guess = (None if value is None else mixed(value) for value in (self._probabilities(batch), batch.guess))
        return replace(batch, x=x, target=target, soft=soft, guess=guess)

    def _probabilities(self, batch: ssl_ae.Batch) -> Tensor | None:
        """(B, C): 1 at the row's class; 0 in rows that have none, whose l_Y does not count. None for data without classes."""
        if batch.soft is not None or self.shapes.classes is None:
            return batch.soft
        return (batch.y[:, None] == torch.arange(self.shapes.classes, device=batch.y.device)).to(batch.x.dtype)

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        y = recipe.card.y
        if y is not None and y.task != "classes":
            yield f"mixup mixes probabilities of classes, but labels of {recipe.card.name} are of kind {y.task}. Remove mixup."


def partners(labeled: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) int64: a permutation that gives each row another one of its kind, where there is one, uniformly over all of these."""
    rows = len(labeled)
    order = (labeled + torch.rand(rows, generator=generator, device=labeled.device)).argsort()  # unlabelled ones first
    at, first = torch.arange(rows, device=labeled.device), (~labeled).sum()
    # in this random order each takes the next, and the last of either kind the first of its kind
    following = torch.where(at == first - 1, 0, torch.where(at == rows - 1, first, at + 1))
    return torch.empty_like(order).scatter(0, order, order[following])
