"""What the machine does meanwhile: CPU, memory and GPU memory of one rank, sampled by a light thread."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import psutil

INTERVAL_SECONDS = 10.0
_MIB = 2**20


class Sampler:
    """Reports `{name: value}` at once, every 10 s, and at `stop`."""

    def __init__(self, report: Callable[[dict[str, float]], None], rank: int) -> None:
        self._report = report
        self._prefix = f"system/rank-{rank}/"
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the clock and always answers 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ssl-ae-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # a sample that cannot be taken or written must not end a training
            stopping = False
            while True:
                self._report({self._prefix + name: value for name, value in self._sample().items()})
                if stopping:
                    return
                stopping = self._stopping.wait(INTERVAL_SECONDS)

    def _sample(self) -> dict[str, float]:
        """`cpu_percent`: 100 is one core busy. Memory in MiB: of this process, and GPU memory over all its devices."""
        return {
            "cpu_percent": self._process.cpu_percent(),
            "memory_mib": self._process.memory_info().rss / _MIB,
            "machine_cpu_percent": psutil.cpu_percent(),
            "machine_memory_percent": psutil.virtual_memory().percent,
            **_gpu_memory(),
        }


def _gpu_memory() -> dict[str, float]:
    torch = sys.modules.get("torch")  # asking must not be what imports torch or starts CUDA
    if torch is None or not torch.cuda.is_initialized():
        return {}
    devices = range(torch.cuda.device_count())
    return {
        "gpu_memory_allocated_mib": sum(torch.cuda.memory_allocated(device) for device in devices) / _MIB,
        "gpu_memory_reserved_mib": sum(torch.cuda.memory_reserved(device) for device in devices) / _MIB,
    }


def this_process() -> dict[str, Any]:
    """Names this process beyond doubt: process ids are reused, so its start (seconds since 1970) belongs to it."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def is_alive(writer: object) -> bool | None:
    """Whether the process that `this_process` described still runs; None where it ran on another machine, or is unknown."""
    match writer:
        case {"host": str(host), "pid": int(pid), "started": float(started)} if host == socket.gethostname():
            try:
                return abs(psutil.Process(pid).create_time() - started) < 1.0
            except (psutil.Error, ValueError):
                return False
    return None
