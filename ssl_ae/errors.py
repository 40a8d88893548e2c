"""Every error a user can meet. Each message says the place, the value, what is allowed and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SslAeError(Exception):
    """Something the user can put right. The command line prints the message alone and leaves with `exit_code`."""

    exit_code = 2


class RecipeError(SslAeError):
    """A recipe, a flag or a combination of components that cannot work."""


class PluginError(SslAeError):
    """A plugin that is missing, broken, ambiguous or breaks its contract."""


class DataError(SslAeError):
    """A data set, label table or latents table that is absent, damaged or not what its card says."""


class CheckpointError(SslAeError):
    """A checkpoint or run folder that is absent, damaged, in use, or belongs to another recipe."""


class DiskError(SslAeError):
    """The disk took no more: it is full, or a quota or a limit on the size of files is reached."""

    exit_code = 1  # the input was right, and the same command goes on once there is space


class NonFiniteError(SslAeError):
    """Training met too many steps in a row whose gradient was not finite."""

    exit_code = 1


class RankLost(SslAeError):
    """Another rank died, stopped or cannot be reached. What was saved is whole."""

    exit_code = 1


class Stopped(SslAeError):
    """Training was asked to stop (SIGTERM, SIGINT) and saved its place."""

    exit_code = 75


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean X?` for the nearest allowed name, or nothing when none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.55)
    return f" Did you mean {near[0]}?" if near else ""


def listing(names: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else "nothing"
