"""`--nproc N`: this very command on several ranks, by torch's elastic launcher inside this process."""

from __future__ import annotations

import sys
import tempfile

from ssl_ae.errors import SslAeError, Stopped

LAUNCHER_OPTIONS = ("--nproc", "--max-restarts")


def launch(ranks: int, restarts: int = 0) -> None:
    """Run this very command on so many ranks of this machine, by torch's elastic launcher; leave with their exit code.

    When a rank dies, all are started again, `restarts` times at most; they go on from the last checkpoint. Raises Stopped
    when the launcher itself is asked to stop; asked again, it aborts.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    try:
        with tempfile.TemporaryDirectory(prefix="ssl-ae-ranks-") as notes:  # by itself the launcher leaves its own behind
            torchrun([*options, "--log-dir", notes, "-m", "ssl_ae", *_without(sys.argv[1:], LAUNCHER_OPTIONS)])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as error:
        if isinstance(error.__context__, SignalException):  # a second one, while the ranks were saving
            raise Aborted("aborted: the ranks were not given the time to save.") from error
        raise Stopped(f"{error}; every rank was asked to save its place. Run the same command to go on.") from error


class Aborted(SslAeError):
    """Asked twice to stop."""

    exit_code = 1


def _without(words: list[str], options: tuple[str, ...]) -> list[str]:
    """The command line without these options and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in options:
            next(rest)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept
