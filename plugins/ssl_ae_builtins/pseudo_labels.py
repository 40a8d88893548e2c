"""Soft pseudo-labels: what an earlier model guesses of unlabelled rows, as sure as it was."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import ssl_ae


class PseudoLabels(ssl_ae.Regularizer):
    """w(x) * -sum_c g_c log p(c|x) over unlabelled rows, g a sharpened guess, w its certainty (soft form of Lee 2013, eq. 15).

    g = guess^power / sum guess^power (Berthelot et al. 2019, eq. 7, power = 1/T). w = (max guess)^sure: rows count by certainty,
    as in Iscen et al. 2019, eq. 11, where entropy says it. Rows with a label, and rows without a guess, count 0; the mean is
    over all rows. The guesses are `data.guesses`, a table of `ssl-ae predict`.
    """

    name = "pseudo_labels"
    needs = frozenset({ssl_ae.Need.PREDICTION, ssl_ae.Need.GUESS})

    class Config(ssl_ae.Config):
        power: float = Field(2.0, gt=0, description="that sharpens a guess; 1: as it is, large: its most probable class alone")
        sure: float = Field(1.0, ge=0, description="exponent of the weight by certainty; 0: all rows alike")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,) in nats."""
        guess = trace.batch.guess
        surest = guess.amax(1)
        guessed = surest > 0
        # divided first, because a large power of a small probability is 0
        sharp = (guess / surest.where(guessed, 1.0)[:, None]) ** self.config.power
        entropy = -(sharp / sharp.sum(1, keepdim=True).clamp(min=1.0) * trace.p_y.logits).sum(1)
        return (surest**self.config.sure * entropy).where(guessed & ~trace.batch.labeled, 0.0)

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        if recipe.shapes.classes is None:
            return [f"pseudo_labels are guesses of classes, and {recipe.card.name} has none. Remove pseudo_labels."]
        return []
