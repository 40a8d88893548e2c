"""MLflow's own pages over a local store: one worker and no job runners, 0.5 GB instead of 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from ssl_ae.errors import DataError, SslAeError
from ssl_ae.tracking import store

HOST = "127.0.0.1"  # the pages have no password


def ui(uri: str | None = None, port: int = 5000) -> int:
    """Serve the store until interrupted; returns MLflow's exit code.

    Raises DataError where there is no local store yet, SslAeError for a store that is a server or a port in use.
    """
    uri = store.store_uri(uri)
    database = store.database_file(uri)
    if database is None:
        raise SslAeError(f"the store {store.without_password(uri)} is a server with its own pages: open them in a browser.")
    if not database.exists():
        raise DataError(f"there is no MLflow store at {database} yet. Train something first, or go where you did.")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise SslAeError(f"port {port} of {HOST} is in use. Choose another with --port.")
    store.set_client_defaults()
    folder = store.artifact_folder(database).as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", folder]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(command, env=environment) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:  # a terminal sends it to the server too; other senders do not
            server.terminate()
            return server.wait()
