"""Ranks and their devices, as far as one process can tell."""

import contextlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssl_ae import distributed
from ssl_ae.distributed import meeting
from ssl_ae.distributed.meeting import Meeting, own_store
from ssl_ae.errors import RankLost, RecipeError


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    """`device: auto` with more ranks than GPUs would end in a traceback of CUDA's."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="4 ranks on a machine with 2 GPUs"), distributed.process_group("auto"):
        pass


def test_a_device_computes_in_bf16_itself_or_not(monkeypatch):
    """A processor by what it says of itself; a GPU by torch's word, emulation left out."""
    flags = Path("/proc/cpuinfo")
    if flags.exists() and platform.machine() == "x86_64":
        native = bool({"avx512_bf16", "amx_bf16"} & {*flags.read_text().split()})
        assert distributed.computes_bf16(torch.device("cpu")) == native
    asked = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or True)
    assert distributed.computes_bf16(torch.device("cuda"))
    assert asked == [False]
    assert not distributed.computes_bf16(torch.device("mps"))


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(meeting, "TICK_SECONDS", 0.05)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def at_once(*works):
    """The results of what several ranks do, each in a thread; the first error of any."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


@contextlib.contextmanager
def two_meetings(store, timeout_seconds):
    both = [Meeting(store, rank, 2, timeout_seconds) for rank in (0, 1)]
    try:
        yield both
    finally:
        for each in both:
            each.close()


def test_a_rank_may_work_alone_for_longer_than_the_time_out(store):
    with two_meetings(store, 1.0) as (first, second):
        for _ in range(3):
            at_once(lambda: (time.sleep(1.5), first.wait()), second.wait)
        assert store.num_keys() <= 5  # two pulses, the last meeting, and what torch keeps


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_gives_no_sign_of_life_is_named(store, lost):
    with two_meetings(store, 1.0) as both:
        both[lost].close()
        with pytest.raises(RankLost, match=f"rank {lost} has given no sign of life for 1 s.*Run the same command to go on"):
            both[1 - lost].wait()


def test_ranks_that_start_again_do_not_meet_the_dead(store):
    """Torch's launcher gives them the store of those that died; a rank may even have died before it came."""
    store.set("greeting/1", "of a dead process")
    store.set("answer/1", "of a dead process" + "and of a dead rank 0")
    for _ in range(2):
        first, second = at_once(lambda: own_store(store, 0, 2, 5.0), lambda: (time.sleep(0.1), own_store(store, 1, 2, 5.0))[1])
        assert not second.check(["left by those before"])
        first.set("left by those before", "x")
        assert second.check(["left by those before"])


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_a_time_out_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv("SSL_AE_TIMEOUT_SECONDS", text)
    with pytest.raises(RecipeError, match=f'SSL_AE_TIMEOUT_SECONDS = "{text}": expected seconds, above 0 and below 1000000'):
        distributed.timeout_seconds()


def test_rank_0_leaves_last(store):
    """Its process may hold the store, and who still reads there would take the end for a fault."""
    both = [Meeting(store, rank, 2, 60) for rank in (0, 1)]
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(both[0].leave, 60)
        time.sleep(0.1)
        assert not leaving.done()
        both[1].leave(60)
        leaving.result(timeout=10)
    for each in both:
        each.close()


def test_who_fails_alone_does_not_wait_long(store):
    alone = Meeting(store, 0, 2, 60)
    started = time.monotonic()
    alone.leave(0.1)
    assert 0.1 <= time.monotonic() - started < 10
    alone.close()
