"""The background thread that delivers while training runs, and gives way whenever the store does not answer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ssl_ae.tracking import store
from ssl_ae.tracking.delivery import Delivery
from ssl_ae.tracking.leftovers import end_if_dead, stages_of
from ssl_ae.tracking.reach import first_line, reach, reason_of

INTERVAL_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
KNOCK_SECONDS = 5.0  # that a server which has not answered yet may take to say that it is there


class Courier:
    """Delivers one stage every 5 s, after failures in 10, 20, 40, 60, 60, ... s, and once more at `finish`.

    Not before the first 5 s are over: importing mlflow takes longer than importing torch, and the first step comes first.
    Nor before a server has answered a plain request: one that is down is not worth that import, nor mlflow's long time-outs.
    A daemon thread: a store that hangs can hold up neither the training nor the end of the process.
    """

    def __init__(self, run_folder: Path, stage_folder: Path, uri: str, warnings: list[str]) -> None:
        store.set_client_defaults()  # here and not in the thread: the environment belongs to the main thread
        self._run_folder, self._stage_folder, self._uri = run_folder, stage_folder, uri
        self._warnings = warnings
        self._warned = threading.Lock()
        self._finishing = threading.Event()
        self._run_id: str | None = None
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ssl-ae-courier", daemon=True)
        self._thread.start()

    def finish(self, timeout_seconds: float) -> str | None:
        """Wait for the last delivery, as long as the store makes progress; the run's id if everything arrived."""
        self._on_progress()
        self._finishing.set()
        while self._thread.is_alive():
            patience = self._progress + timeout_seconds - time.monotonic()
            if patience <= 0:
                self._warn(store.without_password(self._uri), f"nothing in {timeout_seconds:g} s")
                return None
            self._thread.join(patience)
        return self._run_id

    def _run(self) -> None:
        delivery = Delivery(self._run_folder, self._uri, self._on_progress)
        pause, answers = INTERVAL_SECONDS, False
        finishing = False
        while not finishing:
            finishing = self._finishing.wait(pause)  # asked before the pass, so that a last pass sees the last event
            try:
                if not answers and store.database_file(self._uri) is None:
                    reach(self._uri, KNOCK_SECONDS)
                self._run_id = delivery.deliver(self._stage_folder)
                pause, answers = INTERVAL_SECONDS, True
                if finishing:
                    self._deliver_leftovers(delivery)
            except Exception as error:  # whatever a store does, the training must not feel it
                self._run_id, answers = None, False
                self._warn(delivery.store, reason_of(error))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        if delivery.refused:
            self._warnings.append(refusal(delivery))

    def _deliver_leftovers(self, delivery: Delivery) -> None:
        """What earlier stages met no answering store for."""
        for stage in stages_of(self._run_folder):
            if stage != self._stage_folder and not delivery.is_delivered(stage) and end_if_dead(stage):
                delivery.deliver(stage)

    def _on_progress(self) -> None:
        self._progress = time.monotonic()

    def _warn(self, store_name: str, reason: str) -> None:
        if self._warned.acquire(blocking=False):  # the first trouble is told; what follows is the same trouble
            self._warnings.append(
                f"MLflow at {store_name} does not answer ({reason}). Nothing is lost: what is missing is "
                f"delivered as soon as it answers, or later by `ssl-ae track sync {self._run_folder}`."
            )


def refusal(delivery: Delivery) -> str:
    """One sentence for everything the store refused for good."""
    first = first_line(delivery.refused[0])
    return f"MLflow at {delivery.store} refused {len(delivery.refused)} entries; the first: {first}"
