"""Mean and standard deviation of a layer over a batch, and their running averages for when there is no batch to ask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-5  # of torch's batch normalisation
MOMENTUM = 0.1  # part of the newest batch in the running averages, as in torch's


class BatchMoments(nn.Module):
    """h (B, H) or (B, C, *grid) -> (mean, std), each (H,) or (C, 1, ...), of the batch in training, running in evaluation.

    Batch normalisation without its scale and shift (Ioffe & Szegedy 2015, alg. 1 and 2), whose parts `Pass.norm` uses and keeps.

    A joint batch holds the same few labelled rows again and again beside those drawn uniformly. Over both together, a layer
    could tell them apart by their size alone, and what is learnt in evaluation would be of neither. So each kind has moments of
    its own, (B, H) in all, and the running averages follow the uniform rows (Rasmus et al. 2015, the authors' code).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, h: Tensor, learn: bool = True, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """With `learn`, the running averages move towards this batch's. Gradients flow through the batch's own.

        `uniform` (B,) bool: rows drawn uniformly. Where they are all, mean and std are (H,) as without it; a GPU is not asked.
        """
        grid = (-1, *[1] * (h.dim() - 2))
        if not self.training:
            return self.mean.view(grid), (self.var + SMALLEST_VARIANCE).sqrt().view(grid)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))  # squares lose too much in bf16
        if uniform is None or (h.device.type == "cpu" and bool(uniform.all())):
            rest = [0, *range(2, h.dim())]
            mean = wide.mean(rest, keepdim=True)
            var = (wide - mean).square().mean(rest)  # over rows, torch's own variance takes several times as long
            self._learn(mean.flatten(), var, learn)
            return mean.view(grid), (var + SMALLEST_VARIANCE).sqrt().view(grid)
        with torch.autocast(h.device.type, enabled=False):
            group = torch.stack([uniform, ~uniform]).to(wide.dtype)  # (2, B)
            share = group / group.sum(1, keepdim=True).clamp_min(1)
            apart = group.T
            means = share @ _mean_of_grid(wide)  # (2, H)
            mean = (apart @ means).view(len(h), *grid)  # (B, H): of its own kind
            variances = share @ _mean_of_grid((wide - mean).square())
            kind = (~uniform.any()).long()  # of extra rows alone where there are no others
            self._learn(means[kind], variances[kind], learn)
            return mean, (apart @ (variances + SMALLEST_VARIANCE).sqrt()).view(len(h), *grid)

    @torch.no_grad()
    def _learn(self, mean: Tensor, var: Tensor, learn: bool) -> None:
        if learn:
            self.mean.lerp_(mean.to(self.mean.dtype), MOMENTUM)
            self.var.lerp_(var.to(self.var.dtype), MOMENTUM)


def _mean_of_grid(h: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, C)."""
    return h if h.dim() == 2 else h.flatten(2).mean(2)
