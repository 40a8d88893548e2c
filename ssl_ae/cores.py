"""How many cores this process may use: fewer than the machine has, in a container or on a share of a node."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "QUOTA PERIOD" in microseconds, or "max PERIOD" (cgroup v2)


def usable_cores() -> float:
    """What the scheduler and the container leave to this process; a container may leave part of one."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = QUOTA.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or `max`
        return cores
