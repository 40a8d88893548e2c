"""What the workers of `test_crew.py` do: importable by name, because a spawned process imports afresh."""

import time
from pathlib import Path

from ssl_ae.errors import Stopped
from ssl_ae.stopping import stop_signals


def until_asked(place: str) -> None:
    """Leave a trace, then work until somebody asks to stop, as a cell that trains does."""
    with stop_signals() as asked:
        Path(place).touch()
        while not asked.is_set():
            time.sleep(0.01)
    raise Stopped("stopped; saved.")
