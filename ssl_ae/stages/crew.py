"""Many small jobs, one after another in this process or side by side in others: the same work either way, on one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from ssl_ae.errors import SslAeError, Stopped
from ssl_ae.stopping import stop_signals

T, R = TypeVar("T"), TypeVar("R")

_stopped = threading.Event()  # in a worker: asked to stop
LOOK_EVERY_SECONDS = 0.2  # whether somebody asked to stop
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")


class WorkerLost(SslAeError):
    """A process that worked for this one died: killed, or out of memory."""

    exit_code = 1


def work(
    make: Callable[[T], R], jobs: Sequence[T], workers: int, done: Callable[[T, R], None], devices: Sequence[str] = ()
) -> None:
    """`done(job, make(job))` for each job, as they are finished. `make` and jobs travel to other processes by pickle.

    With `devices`, each of several workers sees one of these GPUs alone. Raises Stopped when asked to stop, after what can be
    saved is saved; the first error of a job; and WorkerLost where a worker dies.
    """
    if workers == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _alone(make, jobs, done)
    else:
        _together(make, jobs, min(workers, len(jobs)), done, devices)


def _alone(make: Callable[[T], R], jobs: Sequence[T], done: Callable[[T, R], None]) -> None:
    with one_thread(), stop_signals() as asked:
        for job in jobs:
            if asked.is_set():
                raise Stopped("stopped between two jobs.")
            done(job, make(job))


def _together(
    make: Callable[[T], R], jobs: Sequence[T], workers: int, done: Callable[[T, R], None], devices: Sequence[str]
) -> None:
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for i in range(workers):
        free.put(devices[i % len(devices)] if devices else None)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (free,))
    waiting: dict[Future, T] = {}
    with stop_signals() as asked:
        try:
            with _environment(), _without_interrupts():  # the first of which start the workers
                waiting = {pool.submit(_make, make, job): job for job in jobs}
            while waiting:
                finished, _ = wait(waiting, LOOK_EVERY_SECONDS, FIRST_COMPLETED)
                if asked.is_set():
                    raise Stopped("stopped; the workers were asked to save.")
                for future in finished:
                    done(waiting.pop(future), future.result())
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a worker process died: it was killed, or there was no memory left. "
                "Run the same command to go on, with fewer --jobs where memory is short."
            ) from error
        finally:
            pool.shutdown(wait=not waiting, cancel_futures=True)
            children = set(multiprocessing.active_children()) - before if waiting else set()
            for child in children:
                child.terminate()
            for child in children:  # not by the pool: asked to wait for them, it would begin the jobs that wait
                child.join()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch, BLAS and OpenMP compute on one thread: sums have the same order as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What workers inherit: one thread, and no rank, because each is a world of its own."""
    changes = {name: None for name in os.environ if name in OF_RANKS or name.startswith("TORCHELASTIC_")}
    changes |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside the block do not hear Ctrl-C while they import; this one hears it at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _begin(free) -> None:
    """In a worker, before its first job."""
    device = free.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.setsid()  # Ctrl-C in a terminal is for the process that asks workers to save
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _make(make: Callable[[T], R], job: T) -> R:
    """In a worker: a job, unless this process was asked to stop in one before; some more wait for it already."""
    if _stopped.is_set():
        raise Stopped("stopped between two jobs.")
    try:
        return make(job)
    except Stopped:
        _stopped.set()
        raise


def _leave_with_parent() -> None:
    """A parent that was killed tells nobody."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
