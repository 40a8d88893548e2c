"""A real SQLite store for each test, copied from one that MLflow's migrations made once."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from ssl_ae.tracking import store


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No MLflow setting of the caller reaches a test, and none of a test reaches the next."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("MLFLOW_"):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.set_client_defaults()
    store.create_database(path)
    return path


@pytest.fixture
def local_store(empty_database, tmp_path) -> str:
    """The default store of `tmp_path`, which is the current folder."""
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_database, path)
    return f"sqlite:///{path}"


@pytest.fixture
def client(local_store):
    from mlflow import MlflowClient

    return MlflowClient(local_store)


@pytest.fixture
def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
