"""Mean and standard deviation of a layer over a batch, and their running averages for when there is no batch to ask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-5  # of torch's batch normalisation
MOMENTUM = 0.1  # part of the newest batch in the running averages, as in torch's


class BatchMoments(nn.Module):
    """h (B, H) or (B, C, *grid) -> (mean, std), each (H,) or (C, 1, ...), of the batch in training, running in evaluation.

    Batch normalisation without its scale and shift (Ioffe & Szegedy 2015, alg. 1 and 2), whose parts `Pass.norm` uses and keeps.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, h: Tensor, learn: bool = True) -> tuple[Tensor, Tensor]:
        """With `learn`, the running averages move towards this batch's. Gradients flow through the batch's own."""
        if self.training:
            rest = [0, *range(2, h.dim())]
            wide = h.to(torch.promote_types(h.dtype, torch.float32))  # squares lose too much in bf16
            mean = wide.mean(rest, keepdim=True)
            var = (wide - mean).square().mean(rest)  # over rows, torch's own variance takes several times as long
            mean = mean.squeeze(rest)
            if learn:
                with torch.no_grad():
                    self.mean.lerp_(mean.to(self.mean.dtype), MOMENTUM)
                    self.var.lerp_(var.to(self.var.dtype), MOMENTUM)
        else:
            mean, var = self.mean, self.var
        grid = (-1, *[1] * (h.dim() - 2))
        return mean.view(grid), (var + SMALLEST_VARIANCE).sqrt().view(grid)
