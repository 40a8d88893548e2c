"""A gate before a real MLflow server, which can be shut, left hanging, or made to answer 500 while commands report through it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

STATES = ("open", "shut", "hung", "500")
FAILURE = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Gate:
    """Listens on a port of its own. `state` decides what becomes of a connection, at any moment."""

    def __init__(self, backend: int) -> None:
        self.state = "open"
        self.failed = 0  # requests that were left without a right answer; where it is shut there is nobody to count
        self._backend = backend
        self._ending = False
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._ending = True
        self._thread.join()

    def _run(self) -> None:
        listener, held = None, []
        while not self._ending:
            if self.state == "shut":
                if listener:
                    listener.close()
                listener = None
                time.sleep(0.01)
                continue
            if listener is None:
                listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
            if not select.select([listener], [], [], 0.02)[0]:
                continue
            client, _ = listener.accept()
            self.failed += self.state != "open"
            if self.state == "hung":
                held.append(client)
            else:
                threading.Thread(target=self._serve, args=[client, self.state], daemon=True).start()
        for each in filter(None, (listener, *held)):
            each.close()

    def _serve(self, client: socket.socket, state: str) -> None:
        with client, contextlib.suppress(OSError):
            if state == "500":
                client.recv(65_536)
                client.sendall(FAILURE)
                return
            with socket.create_connection(("127.0.0.1", self._backend)) as server:
                stalled = False
                while not self._ending:  # what is under way when the state changes stalls, and stays so
                    ready = select.select([client, server], [], [], 0.05)[0]
                    if stalled or (ready and self.state != "open"):
                        self.failed += not stalled
                        stalled = True
                        time.sleep(0.05)
                        continue
                    for side in ready:
                        data = side.recv(65_536)
                        if not data:
                            return
                        (server if side is client else client).sendall(data)


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str | None = None) -> Iterator[tuple[int, int]]:
    """A real one on a store, by default one of its own below `folder`: its port, and the process group to stop it by."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store or f"sqlite:///{folder}/served.db"]
    command += ["--artifacts-destination", (folder / "served").as_uri(), "--workers", "1", "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            yield port, process.pid
        finally:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
