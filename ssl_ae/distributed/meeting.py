"""Waiting for other ranks as long as they live: one may work alone for hours, and one that is dead or stopped is noticed.

A collective of torch's cannot do both: it waits for a fixed time, whatever the others are doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from ssl_ae.errors import RankLost

TICK_SECONDS = 1.0
START_PAUSE_SECONDS = 0.01
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.0002, 0.25  # between two looks: a store's own wait prints a warning each time
GO_ON = "Run the same command to go on from the last checkpoint."


def own_store(store: dist.Store, rank: int, world: int, timeout_seconds: float) -> dist.Store:
    """A part of `store` that these ranks alone have: torch's launcher gives ranks that start again the store of those that died.

    Rank 0 answers whoever greets it with the name of the part, until all have come there; a greeting names its process, so that
    the dead are not counted. Raises RankLost.
    """
    me, end = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    if rank:
        store.set(f"greeting/{rank}", me)
        _until(lambda: store.check([f"answer/{rank}"]) and store.get(f"answer/{rank}").decode().startswith(me), end, "rank 0")
        name = store.get(f"answer/{rank}").decode().removeprefix(me)
        store.add(f"{name}/came", 1)
        return dist.PrefixStore(name, store)

    def all_came() -> bool:
        for other in range(1, world):
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{other}", store.get(f"greeting/{other}").decode() + me)
        return store.add(f"{me}/came", 0) == world - 1

    _until(all_came, end, "another rank")
    return dist.PrefixStore(me, store)


def _until(true: Callable[[], bool], end: float, whom: str) -> None:
    while not true():
        if time.monotonic() > end:
            raise RankLost(f"{whom} did not come. {GO_ON}")
        time.sleep(START_PAUSE_SECONDS)


class Meeting:
    """Ranks of one group that wait for each other through a store of torch's.

    While a rank's process lives, a thread of it writes a new number into the store every second; a rank that waits reads rank 0's
    number, and rank 0 everyone's, so that the store is asked world times a second and not world^2.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float) -> None:
        self._store = store.clone()  # a connection of its own: whoever waits holds it
        self._rank, self._world, self._timeout_seconds = rank, world, timeout_seconds
        self._met = 0
        self._ended = threading.Event()
        self._store.set(_pulse(rank), "0")
        self._watched = [_pulse(other) for other in (range(world) if rank == 0 else (0,))]
        self._questions: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._answer, name="store", daemon=True).start()
        self._thread = threading.Thread(target=self._tick, args=[store.clone()], name="pulse", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when every rank is here. Raises RankLost when one has not ticked for the time-out."""
        self._met += 1
        here, all_here, before = f"meeting/{self._met}", f"meeting/{self._met}/all", f"meeting/{self._met - 1}"
        if self._ask(lambda store: store.add(here, 1)) == self._world:
            self._ask(lambda store: store.set(all_here, ""))
            # whoever is here has left the meeting before
            self._ask(lambda store: [store.delete_key(key) for key in (before, f"{before}/all")])
            return
        ticks, pause = {}, SHORTEST_PAUSE_SECONDS
        while not self._ask(lambda store: store.check([all_here])):
            time.sleep(pause)
            if pause < LONGEST_PAUSE_SECONDS:
                pause *= 1.5
            else:
                self._check(ticks)

    def leave(self, patience_seconds: float) -> None:
        """Say farewell. Rank 0, whose process may hold the store that others still read, stays until all have, or for so long."""
        with contextlib.suppress(RankLost):
            self._ask(lambda store: store.add("farewell", 1))
            end = time.monotonic() + patience_seconds
            while self._rank == 0 and self._ask(lambda store: store.add("farewell", 0)) < self._world and time.monotonic() < end:
                time.sleep(START_PAUSE_SECONDS)

    def close(self) -> None:
        self._ended.set()
        self._thread.join(2 * TICK_SECONDS)
        self._questions.put(None)

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """What the store answers; asked by a thread, because a store's sockets wait forever for a network that is gone."""
        answer: SimpleQueue = SimpleQueue()
        self._questions.put((question, answer))
        try:
            found, error = answer.get(timeout=self._timeout_seconds)
        except Empty:
            raise RankLost(f"the ranks' store has not answered for {self._timeout_seconds:g} s. {GO_ON}") from None
        if error is not None:
            raise RankLost(f"the connection to the other ranks is gone ({error}). {GO_ON}") from error
        return found

    def _answer(self) -> None:
        while (asked := self._questions.get()) is not None:
            question, answer = asked
            try:
                answer.put((question(self._store), None))
            except dist.DistError as error:
                answer.put((None, error))

    def _check(self, ticks: dict[str, tuple[bytes, float]]) -> None:
        """Note who ticked and when; only silence that was listened to counts."""
        now = time.monotonic()
        for key, tick in zip(self._watched, self._ask(lambda store: store.multi_get(self._watched)), strict=True):
            last, at = ticks.get(key, (tick, now))
            ticks[key] = (tick, at if tick == last else now)
            if now - ticks[key][1] > self._timeout_seconds:
                raise RankLost(
                    f"rank {key.rpartition('/')[2]} has given no sign of life for {self._timeout_seconds:g} s: its process was "
                    f"killed or stopped, or its machine or the network is gone. {GO_ON}"
                )

    def _tick(self, store: dist.Store) -> None:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in count(1):
            if self._ended.wait(TICK_SECONDS):
                return
            if launcher is not None and os.getppid() != launcher:  # nobody is left to stop this rank when another one dies
                os.kill(os.getpid(), signal.SIGTERM)
                launcher = None
            try:
                store.set(_pulse(self._rank), str(number))
            except dist.DistError:
                if launcher is None:
                    return


def _pulse(rank: int) -> str:
    return f"pulse/{rank}"
