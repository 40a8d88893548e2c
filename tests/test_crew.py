"""Jobs side by side, and somebody who asks to stop."""

import os
import signal
import threading
import time

import crew_kit
import psutil
import pytest

from ssl_ae.errors import Stopped
from ssl_ae.stages.crew import work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_to_stop_begins_no_other_job(tmp_path, number):
    """Two jobs are under way, some wait in the workers' own queue, the rest in the parent: none of these is begun."""
    places = [tmp_path / str(i) for i in range(11)]

    def ask_once_both_are_busy():
        end = time.monotonic() + 60
        while sum(place.exists() for place in places) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask_once_both_are_busy)
    before = set(psutil.Process().children(recursive=True))
    asking.start()
    with pytest.raises(Stopped):
        work(crew_kit.until_asked, list(map(str, places)), 2, lambda job, found: None)
    asking.join()
    assert sum(place.exists() for place in places) == 2
    workers = set(psutil.Process().children(recursive=True)) - before
    assert not [one for one in workers if "spawn_main" in " ".join(one.cmdline())]
