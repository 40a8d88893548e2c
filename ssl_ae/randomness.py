"""Where random numbers come from: counters, so that nothing has to be saved to go on."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*counters: int) -> int:
    """One 63-bit seed of several counters, such as (seed, step, rank)."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0]) >> 1


def seed_draws(seed: int, device: torch.device = torch.device("cpu")) -> None:
    """Seed the generators that components draw from: the host's and the device's own.

    torch.manual_seed would also queue a call, with a stack trace, for every backend that is not initialised.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
