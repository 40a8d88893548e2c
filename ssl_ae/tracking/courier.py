"""The background thread that delivers while training runs, and gives way whenever the store does not answer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ssl_ae.tracking import store
from ssl_ae.tracking.delivery import Delivery

INTERVAL_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0


class Courier:
    """Delivers one stage every 5 s, after failures in 10, 20, 40, 60, 60, ... s, and once more at `finish`.

    Not before the first 5 s are over: importing mlflow takes longer than importing torch, and the first step comes first.
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
        pause = INTERVAL_SECONDS
        finishing = False
        while not finishing:
            finishing = self._finishing.wait(pause)  # asked before the pass, so that a last pass sees the last event
            try:
                self._run_id = delivery.deliver(self._stage_folder)
                pause = INTERVAL_SECONDS
            except Exception as error:  # whatever a store does, the training must not feel it
                self._run_id = None
                self._warn(delivery.store, str(error) or type(error).__name__)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        if delivery.refused:
            self._warnings.append(refusal(delivery))

    def _on_progress(self) -> None:
        self._progress = time.monotonic()

    def _warn(self, store_name: str, reason: str) -> None:
        if self._warned.acquire(blocking=False):  # the first trouble is told; what follows is the same trouble
            self._warnings.append(
                f"MLflow at {store_name} does not answer ({first_line(reason)}). Nothing is lost: what is missing is "
                f"delivered as soon as it answers, or later by `ssl-ae track sync {self._run_folder}`."
            )


def refusal(delivery: Delivery) -> str:
    """One sentence for everything the store refused for good."""
    first = first_line(delivery.refused[0])
    return f"MLflow at {delivery.store} refused {len(delivery.refused)} entries; the first: {first}"


def first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."
