"""Ranks: the only room that speaks to torch.distributed. One process without torchrun is a world of one."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_ae.distributed.meeting import GO_ON, Meeting, own_store
from ssl_ae.distributed.sharding import (
    Shards,
    cut,
    gather,
    load_weights,
    on_this_rank,
    own_part,
    parallel,
    total_norm,
    without_sync,
)
from ssl_ae.errors import RankLost, RecipeError

__all__ = ["Shards", "cut", "gather", "load_weights", "on_this_rank", "own_part", "parallel", "total_norm", "without_sync"]

TIMEOUT_SECONDS = 180.0  # for a rank that is dead or stopped; SSL_AE_TIMEOUT_SECONDS names another
LEAVING_SECONDS = 2.0  # for ranks that fail or stop together; who fails alone must not keep the launcher waiting
AGREE_EVERY = 8  # steps

_meeting: Meeting | None = None  # of this process, while it is one of several ranks


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the ranks that torchrun started, and yield this rank's device. One inside another is the outer one.

    A process joins once: ranks that left cannot meet again.
    """
    chosen = choose_device(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and chosen.type == "cuda":
        chosen = torch.device("cuda", _own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if not several or dist.is_initialized():
        yield chosen
        return
    with _joined("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"):
        # gloo beside NCCL: counts and sums that live on the host need not visit a GPU
        yield chosen


@contextlib.contextmanager
def _joined(backend: str) -> Iterator[None]:
    global _meeting
    seconds, patience = timeout_seconds(), LEAVING_SECONDS
    try:
        store, own, ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        store = own_store(store, own, ranks, seconds)
        _meeting = Meeting(store, own, ranks, seconds)
        dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=timedelta(seconds=seconds))
        yield
        patience = seconds
    except RankLost:
        patience = None
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            patience = None
            reason = str(error).strip().splitlines()[0][:200]
            raise RankLost(f"another rank is gone, or did not answer for {seconds:g} s ({reason}). {GO_ON}") from error
        raise
    finally:
        if _meeting is not None:
            if patience is not None:
                _meeting.leave(patience)
            _meeting.close()
            _meeting = None
        if dist.is_initialized():
            dist.destroy_process_group()


def timeout_seconds() -> float:
    """How long a rank may be silent. Raises RecipeError for another SSL_AE_TIMEOUT_SECONDS than from 0 to a million."""
    text = os.environ.get("SSL_AE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise RecipeError(f'SSL_AE_TIMEOUT_SECONDS = "{text}": expected seconds, above 0 and below 1000000; unset, it is 180.')
    return seconds


def _own_gpu(there: int) -> int:
    """The number of this rank's GPU on its machine. Raises RecipeError for more ranks than GPUs."""
    own = int(os.environ["LOCAL_RANK"])
    if own >= there:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", own + 1)
        raise RecipeError(f"{ranks} ranks on a machine with {there} GPUs: start one rank a GPU, or set device: cpu.")
    return own


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises RecipeError for a device this machine lacks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available[name]:
        there = ", ".join(device for device, ok in available.items() if ok)
        raise RecipeError(f"device = {name}: torch finds none on this machine; available: {there}. Set device: auto.")
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Whether torch says that products in bf16 are the device's own; emulated they take two to four times as long as in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's `value`, on every rank; in place, without gradient."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def first_over_ranks(index: Tensor) -> Tensor:
    """The smallest index of any rank that has one, -1 where none has; () int64."""
    if world() > 1:
        index = torch.where(index < 0, torch.iinfo(index.dtype).max, index)
        dist.all_reduce(index, dist.ReduceOp.MIN)
        index = torch.where(index == torch.iinfo(index.dtype).max, -1, index)
    return index


class Agreement:
    """How ranks find at the same step that one of them is asked to stop, without waiting for each other.

    Every few steps they begin to add up who was asked, on the host, and look at the sum that they began the time before.
    """

    def __init__(self) -> None:
        self._asked = torch.zeros(())
        self._sum: dist.Work | None = None

    def asked(self, here: bool, step: int) -> bool:
        """Whether to stop after this step; every rank calls it after every step. Alone, a rank stops at once."""
        if world() == 1:
            return here
        if step % AGREE_EVERY:
            return False
        if self._sum is not None:
            self._sum.wait()
        known = bool(self._asked)
        self._asked = torch.tensor(float(here))
        self._sum = dist.all_reduce(self._asked, async_op=True)
        return known

    def close(self) -> None:
        if self._sum is not None:
            self._sum.wait()


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank. Small, trusted values of our own making only: it pickles."""
    if world() == 1:
        return value
    barrier()  # rank 0 may have worked alone for longer than a collective waits
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank, however long it works alone. Raises RankLost for one that is dead or stopped."""
    if _meeting is not None:
        _meeting.wait()


@contextlib.contextmanager
def main_first() -> Iterator[bool]:
    """Run the block on rank 0 alone (others get False); a failure there is raised on every rank."""
    error: BaseException | None = None
    if is_main():
        try:
            yield True
        except Exception as caught:
            error = caught
    else:
        yield False
    failed = from_main(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    if failed:
        raise RecipeError(f"rank 0 failed with {failed[0]}: {failed[1]}")
