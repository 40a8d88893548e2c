"""Signals that ask a process to stop: SIGTERM, and SIGINT from Ctrl-C. A second SIGINT aborts without saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Asked(BaseException):
    """Asked to stop where nothing has to be saved first. No Exception, so that nobody takes it for a failure of their own."""


@contextmanager
def leave_when_asked() -> Iterator[None]:
    """Raise Asked where the process is when a signal comes: every file is written whole or not at all."""

    def leave(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else signal.default_int_handler)
        raise Asked

    with _handled_by(leave):
        yield


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that a signal sets, so that training can save and leave; a second SIGINT aborts at once.

    So does any signal after a SIGINT: torch's launcher makes a SIGTERM of the second Ctrl-C.
    """
    asked, interrupted = threading.Event(), threading.Event()

    def ask(number: int, frame: object) -> None:
        if interrupted.is_set() or (asked.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            interrupted.set()
        asked.set()

    with _handled_by(ask):
        yield asked


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
