"""Whether a store answers, without mlflow: importing that takes 3 s, and its client would wait for minutes."""

from __future__ import annotations

import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from ssl_ae.tracking import store

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Unreachable(Exception):
    """The store does not answer, or answers that it cannot serve."""


def reach(uri: str, timeout_seconds: float) -> str:
    """What answered, in a few words. Raises Unreachable with the reason.

    Only silence and errors of the server's own count as no answer: what a proxy or a certificate refuses to this request,
    mlflow's client may be allowed.
    """
    if (database := store.database_file(uri)) is not None:
        return _sqlite(database)
    address = urlsplit(uri)
    try:
        if address.scheme in ("http", "https"):
            return _server(uri, timeout_seconds)
        if address.hostname is None:
            return "not asked: only mlflow itself knows how to reach it"
        port = address.port or PORTS.get(address.scheme.partition("+")[0])
        if port is None:
            return "not asked: its port is not known"
        socket.create_connection((address.hostname, port), timeout_seconds).close()
    except (OSError, ValueError) as error:  # a refused connection, a name nobody knows, a time-out, a port that is no number
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return "answers, with a certificate that is not known here"
        raise Unreachable(reason_of(error)) from error
    return "the database's port answers"


def reason_of(error: BaseException) -> str:
    """The first cause of a failed request, in the system's words; mlflow's and urllib's are long and hold addresses."""
    met: list[object] = [error]
    for each in met:
        if isinstance(each, TimeoutError) or "Timeout" in type(each).__name__:
            return "timed out"
        if isinstance(each, OSError) and each.strerror and not isinstance(each, urllib.error.URLError):
            return each.strerror
        inner = [getattr(each, "__cause__", None), getattr(each, "__context__", None), getattr(each, "reason", None)]
        inner += getattr(each, "args", ())
        met += [one for one in inner if isinstance(one, BaseException) and one not in met]
    return first_line(str(error) or type(error).__name__)


def first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def _sqlite(database: Path) -> str:
    if not database.exists():
        folder = next(folder for folder in database.parents if folder.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise Unreachable(f"it does not exist, and {folder} is not writable")
        return "will be made by the first run"
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as connection:
            (runs,) = connection.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        raise Unreachable(f"the file is no MLflow store ({error})") from error
    if not os.access(database, os.W_OK):
        raise Unreachable("the file is not writable")
    return f"{runs:,} run{'' if runs == 1 else 's'}"


def _server(uri: str, timeout_seconds: float) -> str:
    plain = store.without_password(uri)  # the health of a server is no secret, and urllib takes no user in an address
    request = urllib.request.Request(f"{plain.rstrip('/')}/health", headers={"User-Agent": "ssl-ae"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            return f"answers ({answer.status})"
    except urllib.error.HTTPError as error:
        with error:
            if error.code >= 500:
                raise Unreachable(f"{error.code} {error.reason}") from error
            return f"answers ({error.code} {error.reason})"
