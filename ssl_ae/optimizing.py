"""Optimizers and schedules by their recipe names, and the guard that skips steps whose gradient is not finite."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssl_ae import distributed
from ssl_ae import recipe as recipes
from ssl_ae.errors import NonFiniteError


def build_optimizer(options: recipes.Optimizer, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """torch's fused kernels: one launch, and an update that is skipped on the device. Biases and norms do not decay.

    On a GPU the rate is a tensor there, because a recorded update reads it anew each time.
    """
    device = parameters[0].device if parameters else torch.device("cpu")
    on_gpu = device.type == "cuda"
    lr = torch.tensor(options.lr, device=device) if on_gpu else options.lr
    by_decay: dict[float, list[nn.Parameter]] = {}  # a launch each
    for parameter in parameters:
        by_decay.setdefault(options.weight_decay if parameter.dim() > 1 else 0.0, []).append(parameter)
    groups = [{"params": members, "weight_decay": decay} for decay, members in by_decay.items()]
    kinds = {
        "adamw": lambda: uncompiled(AdamW)(groups, lr=lr, betas=options.betas, fused=True, capturable=on_gpu),
        "adam": lambda: uncompiled(Adam)(groups, lr=lr, betas=options.betas, fused=True, capturable=on_gpu),
        "sgd": lambda: _with_momentum(uncompiled(SGD)(groups, lr=lr, momentum=options.momentum, fused=True)),
    }
    return kinds[options.name]()


@cache
def uncompiled(kind: type[Optimizer]) -> type[Optimizer]:
    """`kind` without the wrappers that torch puts around its methods for torch.compile, which never sees an optimizer here.

    The first call of each imports the whole compiler, and that takes as long as importing torch.
    """
    guarded = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in guarded}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def _with_momentum(sgd: SGD) -> SGD:
    """Zero buffers from the start give the same first step; torch would leave them unset when that step is skipped."""
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def go_on(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state, also one of another device or of whole parameters where these are sharded.

    Where the rate lives is this optimizer's own.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        i: {name: distributed.cut(value, parameters[i]) for name, value in each.items()} for i, each in state["state"].items()
    }
    own = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    optimizer.load_state_dict(state | {"state": kept})
    for group, (lr, capturable) in zip(optimizer.param_groups, own, strict=True):
        saved = float(group["lr"])
        group["lr"] = lr.fill_(saved) if torch.is_tensor(lr) else saved
        if capturable is not None:
            group["capturable"] = capturable


def build_schedule(options: recipes.Schedule, optimizer: Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up, then constant, linear or cosine (Loshchilov & Hutter 2017, eq. 5, no restarts) down to `final`.

    The fall starts after the warm-up or the part `hold` of the steps, whichever ends later.
    """
    start = max(options.warmup_steps, options.hold * steps)

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        progress = min(1.0, max(0.0, step - start) / max(1.0, steps - start))
        falling = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[options.name]
        return options.final + (1.0 - options.final) * falling

    return LambdaLR(optimizer, factor)


class Watch:
    """Counts steps with a gradient that is not finite, on the device; the host looks when it reads the metrics anyway.

    In place, as everything that a step leaves for the next: a replayed step finds it where it was recorded.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped, self.in_a_row = zero.clone(), zero.clone()
        self.limit_step, self.suspect = zero - 1, zero - 1

    def see(self, found: Tensor, shares: Tensor, step: Tensor) -> None:
        """found () bool, shares (terms,) of this rank, step ()."""
        if found.device.type == "cpu" and not (found or self.in_a_row):
            return  # nothing to note, and the host waits for nobody when it asks itself
        self.skipped += found
        self.in_a_row += 1
        self.in_a_row *= found
        bad = ~torch.isfinite(shares)
        first = torch.where(bad.any(), bad.float().argmax(), -1) if len(shares) else self.suspect
        self.suspect.copy_(torch.where(found & (self.in_a_row == 1), first, self.suspect))
        reached = (self.in_a_row >= self.limit) & (self.limit_step < 0)
        self.limit_step.copy_(torch.where(reached, step, self.limit_step))

    def check(self, phase: str, terms: Sequence[str], suspect: int) -> None:
        """Raises NonFiniteError once the limit was reached. `suspect` is the first bad term over all ranks, or -1."""
        step = int(self.limit_step)
        if step < 0:
            return
        cause = (
            f"first suspect: term {terms[suspect]!r}"
            if suspect >= 0
            else "every term was finite, so the gradient itself overflowed"
        )
        raise NonFiniteError(
            f"step {step}, phase {phase!r}: {self.limit} steps in a row had a gradient that is not finite; {cause}. "
            "Those updates were skipped and the last good checkpoint is kept. "
            "Lower optimizer.lr, set clip_norm, or use precision: fp32."
        )

    def state(self) -> dict[str, Tensor]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "suspect": self.suspect}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
