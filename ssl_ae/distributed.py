"""Ranks: the only room that speaks to torch.distributed. One process without torchrun is a world of one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ae.errors import RecipeError, Stopped

LAUNCHER_OPTIONS = ("--nproc", "--max-restarts")
TIMEOUT = timedelta(minutes=30)  # rank 0 packs, judges and draws alone; a rank that died is noticed by the launcher at once


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
    # gloo beside NCCL: counts and sums that live on the host need not visit a GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


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


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest of every rank's `value`, on every rank; in place."""
    if world() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: how ranks agree to stop at one step."""
    if world() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank. Small, trusted values of our own making only: it pickles."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


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


def parallel(step: nn.Module) -> nn.Module:
    """`step` with gradients averaged over ranks by DistributedDataParallel; itself in a world of one.

    Only parameters that require gradients now take part; a component may leave some of its own unused in a phase.
    """
    if world() == 1:
        return step
    return DistributedDataParallel(step, find_unused_parameters=True)


def on_this_rank(step: nn.Module) -> nn.Module:
    """The step without its parallel wrapper."""
    return step.module if isinstance(step, DistributedDataParallel) else step


def without_sync(step: nn.Module, skip: bool) -> contextlib.AbstractContextManager:
    """Whether this backward pass leaves the reduction to a later micro-batch."""
    return step.no_sync() if skip and isinstance(step, DistributedDataParallel) else contextlib.nullcontext()


def launch(ranks: int, restarts: int = 0) -> None:
    """Run this very command on so many ranks of this machine, by torch's elastic launcher; leave with their exit code.

    When a rank dies, all are started again, `restarts` times at most; they go on from the last checkpoint. Raises Stopped
    when the launcher itself is asked to stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    try:
        torchrun([*options, "-m", "ssl_ae", *_without(sys.argv[1:], LAUNCHER_OPTIONS)])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as error:
        raise Stopped(f"{error}; every rank was asked to save its place. Run the same command to go on.") from error


def _without(words: list[str], options: tuple[str, ...]) -> list[str]:
    """The command line without these options and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in options:
            next(rest)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept
