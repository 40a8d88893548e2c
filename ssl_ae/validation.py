"""How good a model is on rows it does not learn from: each term's mean, and the figures a human reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from ssl_ae.data.loading import Feed
from ssl_ae.distributed import sum_over_ranks
from ssl_ae.model import Model, frozen
from ssl_ae.objective import Objective
from ssl_ae.randomness import seed_draws
from ssl_ae.trace import Batch, Need, Over

SEED = 1_234_567  # draws of z in validation: the same at every epoch, so that curves compare
BATCH_ROWS = 1024


def validate(model: Model, objective: Objective, feed: Feed) -> dict[str, float]:
    """Means over the rows of `feed`, over all ranks: one entry a term, `loss` (their weighted sum, warm-up complete),
    `mse` where the decoder runs, `accuracy` or `rmse` where the head runs. Without noise; randomness is fixed.
    """
    data, step = objective.of_data, torch.tensor(2**62)  # every warm-up is over
    needs = data.needs - {Need.TEACHER, Need.VIEW}
    data = Objective(tuple(term for term in data.terms if not term.needs & {Need.TEACHER, Need.VIEW}))
    totals = torch.zeros(len(data.terms), dtype=torch.float64)
    counts = torch.zeros(len(data.terms), dtype=torch.float64)
    human = {
        name: torch.zeros(2, dtype=torch.float64) for name in ("accuracy", "mse", "rmse")
    }  # ranks must agree on what they sum
    with frozen(model), torch.random.fork_rng(devices=_devices(feed)), torch.set_grad_enabled(Need.INPUT_GRAD in needs):
        seed_draws(SEED, feed.device)
        for batch in feed.in_order(BATCH_ROWS):
            rows = _local_rows(batch)
            trace = model(batch, needs, _mean_of_batch)
            size = torch.stack([_weight_of(term.over, batch) for term in data.terms])
            size = size.cpu().double()  # on the host, because not every device has float64
            totals += data.shares(trace, rows).detach().cpu().double() * size
            counts += size
            for name, value in _human(trace.p_x, trace.p_y, trace.batch).items():
                human[name] += value.cpu().double()
    totals, counts = sum_over_ranks(totals), sum_over_ranks(counts)
    means_of_terms = totals / counts.clamp_min(1)
    values = {term.name: float(value) for term, value in zip(data.terms, means_of_terms, strict=True)}
    values["loss"] = float(data.weigh(means_of_terms, step))
    for name, sums in human.items():
        total, count = sum_over_ranks(sums).tolist()
        if count:
            values[name] = (total / count) ** 0.5 if name == "rmse" else total / count
    return values


def _human(p_x: Distribution | None, p_y: Distribution | None, batch: Batch) -> dict[str, Tensor]:
    """{metric: (2,) sum and count}."""
    values = {}
    if p_x is not None:
        squares = (p_x.mean - batch.target).square()
        values["mse"] = torch.stack([squares.sum(), torch.tensor(float(squares.numel()), device=squares.device)])
    if p_y is not None and batch.y.dim() == 1:
        right = (p_y.logits.argmax(1) == batch.y) & batch.labeled
        values["accuracy"] = torch.stack([right.sum(), batch.labeled.sum()])
    elif p_y is not None:
        there = ~batch.y.isnan()
        squares = (p_y.mean - batch.y.where(there, 0.0)).square().where(there, 0.0)
        values["rmse"] = torch.stack([squares.sum(), there.sum()])
    return {name: value.detach() for name, value in values.items()}


def _mean_of_batch(value: Tensor, uniform: Tensor) -> Tensor:
    """Terms of a step's mean take the mean of a validation batch: ranks may have different numbers of them."""
    return value.mean(0)


def _local_rows(batch: Batch) -> dict[Over, Tensor]:
    rows = torch.tensor(len(batch), device=batch.x.device)
    return {Over.ROWS: rows, Over.LABELED: batch.labeled.sum().clamp_min(1), Over.STEP: torch.ones_like(rows)}


def _weight_of(over: Over, batch: Batch) -> Tensor:
    return batch.labeled.sum() if over is Over.LABELED else torch.tensor(len(batch), device=batch.x.device)


def _devices(feed: Feed) -> list[int]:
    return [feed.device.index or 0] if feed.device.type == "cuda" else []
