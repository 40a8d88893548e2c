"""Which MLflow store a run reports to, and how mlflow's client is set up before it is imported."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from ssl_ae import files
from ssl_ae.errors import SslAeError, did_you_mean, listing

MODE = "SSL_AE_TRACKING"
MODES = ("live", "journal")

_CLIENT_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; mlflow's own 120 and 7 retries block for 4 minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the courier has its own back-off
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # its progress lines would tear our progress bar
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is the command's own answer
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # else a uv.lock in the current folder replaces a model's requirements
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",  # it would ask a package index
}


def set_client_defaults() -> None:
    """Put our defaults for mlflow's client into the environment where the user chose nothing."""
    for name, value in _CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def store_uri(given: str | None = None) -> str:
    """The store to report to: `given`, else MLFLOW_TRACKING_URI, else `sqlite:///<current folder>/runs/mlflow.db`.

    A relative SQLite path is made absolute. Raises SslAeError for stores that MLflow refuses or that nobody can read
    later: plain folders, `file:` and SQLite in memory.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'runs' / 'mlflow.db'}"
    if re.match(r"databricks(-uc)?(:|$)", uri):
        return uri
    scheme, separator, rest = uri.partition(":")
    if not separator or scheme == "file" or len(scheme) == 1:  # one letter is a drive of Windows
        where = "" if given else "MLFLOW_TRACKING_URI = "
        raise SslAeError(
            f"{where}{uri!r} is a folder, and MLflow keeps no runs in folders any more. "
            f"Use an SQLite file, sqlite:///{Path.cwd() / 'runs' / 'mlflow.db'}, or the address of a server, http://HOST:PORT."
        )
    if not scheme.startswith("sqlite"):
        return uri
    path, question, query = rest.removeprefix("///").partition("?")
    if not rest.startswith("///") or path in ("", ":memory:"):
        raise SslAeError(f"{uri!r} keeps its runs in memory, where they are lost. Name a file: sqlite:///runs/mlflow.db.")
    return f"{scheme}:///{Path.cwd() / path}{question}{query}"


def live_store() -> str | None:
    """The store that stages report to while they run; None where SSL_AE_TRACKING=journal leaves it to `ssl-ae track sync`.

    Raises SslAeError for another value of SSL_AE_TRACKING than `live` and `journal`, and as `store_uri` does.
    """
    mode = os.environ.get(MODE, "live")
    if mode not in MODES:
        raise SslAeError(f"{MODE} = {mode!r}: expected {listing(MODES)}.{did_you_mean(mode, MODES)}")
    return store_uri() if mode == "live" else None


def without_password(uri: str) -> str:
    """The URI as files and messages may show it."""
    return re.sub(r"^([^/]*//)[^/]*@", r"\1", uri)


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store, or None for a store behind a server."""
    return Path(uri.partition(":///")[2].partition("?")[0]) if uri.startswith("sqlite") else None


def artifact_folder(database: Path) -> Path:
    """Where the artifacts of an SQLite store lie: beside it, not in whatever folder a command was started."""
    return database.with_name("mlartifacts")


def create_database(database: Path) -> None:
    """Create an SQLite store whole or not at all.

    MLflow fills the file by some fifty migrations, and a process killed among them leaves a file that MLflow refuses
    for ever; so it is filled aside. Of several processes that create it at once the first wins.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if database.exists():
        return
    files.make_folder(database.parent)
    aside = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        SqlAlchemyStore(f"sqlite:///{aside}", artifact_folder(database).as_uri()).engine.dispose()
        try:
            os.link(aside, database)  # unlike a rename it never replaces a store that already holds runs
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not database.exists():
                os.replace(aside, database)
    finally:
        aside.unlink(missing_ok=True)
