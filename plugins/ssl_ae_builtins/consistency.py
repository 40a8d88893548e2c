"""Learning from rows without labels: a row that is disturbed shall be predicted as the averaged model predicts it undisturbed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl_ae
from ssl_ae.distributed import sum_over_ranks

NEWEST = 1 / 128  # part of a step in the running mean: ReMixMatch averages over 128 batches
SMALLEST = 1e-6  # added above and below in the ratio of alignment, as in its authors' code


class Consistency(ssl_ae.Regularizer):
    """1(max p_t >= threshold) H(argmax p_t, p(y|x~)) per row, in nats, (B,) (FixMatch, Sohn et al. 2020, eq. 4).

    p_t is the teacher's p(y|x) of the undisturbed row, without gradient. The teacher is the exponential moving average of the
    weights (Mean Teacher, Tarvainen & Valpola 2017, eq. 1), whose decay is `finetune.ema`, where FixMatch takes the weights
    themselves. x~ is the row as this pass sees it, through every regularizer that perturbs: FixMatch's strong view. A row
    below the threshold counts as 0 in the mean over all rows, labelled ones like the others (the authors put all labelled rows
    among the unlabelled ones too); what the draw adds for l_Y is left out. l_Y is of the disturbed row too, where FixMatch
    disturbs labelled rows weakly.

    `soft`: H(q, p(y|x~)), q proportional to p_t^(1/sharpen). `align`: p_t is first multiplied by prior / (running mean of p_t)
    and normalised (ReMixMatch, Berthelot et al. 2020, sec. 3.1); the mean is of the steps before this one, on all ranks.
    """

    name = "consistency"
    needs = frozenset({ssl_ae.Need.PREDICTION, ssl_ae.Need.TEACHER})

    class Config(ssl_ae.Config):
        threshold: float = Field(0.95, ge=0, lt=1, description="a row counts where the teacher's largest probability reaches it")
        target: Literal["class", "soft"] = Field("class", description="class: the teacher's most likely; soft: its distribution")
        sharpen: float = Field(1.0, gt=0, le=1, description="of soft: temperature, below 1 the target is surer than the teacher")
        align: bool = Field(False, description="bring the frequencies of the teacher's classes to `prior`")
        prior: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
            None, description="of align: how frequent each class is, in the order of the classes; default: all alike"
        )

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        if config.align:
            prior = torch.tensor(config.prior or [1 / shapes.classes] * shapes.classes)
            self.register_buffer("prior", prior, persistent=False)
            self.register_buffer("mean", prior.clone())  # of p_t over the steps so far
            self.register_buffer("seen", torch.zeros(len(prior) + 1), persistent=False)  # this step's sum of p_t, and its rows

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        p = trace.teacher.p_y.probs
        if self.config.align:
            p = self._aligned(p, trace.batch.uniform)
        own = trace.p_y.logits  # normalised
        if self.config.target == "class":
            entropy = -own.gather(1, p.argmax(1, keepdim=True))[:, 0]
        else:
            entropy = -((p.log() / self.config.sharpen).softmax(1) * own).sum(1)
        return entropy.where(p.amax(1) >= self.config.threshold, 0.0)

    def project(self, model: nn.Module) -> None:
        """No parameter changes: after a step, the running mean moves towards what all its parts on all ranks have seen."""
        if not self.config.align:
            return
        seen = sum_over_ranks(self.seen)
        part = (NEWEST * (seen[-1] > 0)).to(seen.dtype)  # a step of another phase saw nothing
        self.mean.lerp_(seen[:-1] / seen[-1].clamp_min(1), part)
        self.seen.zero_()

    def _aligned(self, p: Tensor, uniform: Tensor) -> Tensor:
        """p (B, C), each row times prior / mean and normalised."""
        if self.training:
            counted = uniform & p.isfinite().all(1)  # one bad row would stay in the mean for ever
            rows = torch.cat([p, torch.ones_like(p[:, :1])], dim=1).where(counted[:, None], 0.0)
            self.seen += rows.sum(0).to(self.seen.dtype)
        p = p * ((self.prior + SMALLEST) / (self.mean + SMALLEST))
        return p / p.sum(1, keepdim=True)

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        classes = recipe.shapes.classes
        if classes is None:
            yield f"consistency compares probabilities of classes, and {recipe.card.name} has none. Remove consistency."
        if config.target == "class" and config.sharpen != 1:
            yield f"consistency.sharpen = {config.sharpen:g}: has no effect on a class. Set target: soft, or remove it."
        if config.prior is None:
            return
        if not config.align:
            yield "consistency.prior: has no effect without alignment. Set align: true, or remove it."
        total = math.fsum(config.prior)
        if classes is not None and len(config.prior) != classes:
            yield f"consistency.prior has {len(config.prior)} numbers, but there are {classes} classes. Give one a class."
        elif not math.isclose(total, 1, abs_tol=1e-6):
            yield f"consistency.prior: its numbers add up to {total:g}, not to 1. Give the share of each class."
