import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_ae.errors import SslAeError
from ssl_ae.tracking import store

ROOT = Path(__file__).parents[2]


def test_the_default_is_an_sqlite_file_under_the_current_folder(tmp_path):
    assert store.store_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_environment_is_honoured_and_an_argument_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert store.store_uri() == "http://tracking:5000"
    assert store.store_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"


@pytest.mark.parametrize("uri", ["sqlite:////srv/m.db", "postgresql+psycopg2://u:p@h/db", "databricks", "https://h"])
def test_stores_that_work_pass_unchanged(uri):
    assert store.store_uri(uri) == uri


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/srv/mlruns", "file:///srv/mlruns", "file:mlruns", r"C:\mlruns"])
def test_a_folder_is_refused_with_the_cure(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SslAeError, match=r"MLFLOW_TRACKING_URI = .* is a folder.*sqlite:///.*/runs/mlflow\.db"):
        store.store_uri()


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_store_in_memory_is_refused(uri):
    with pytest.raises(SslAeError, match="in memory"):
        store.store_uri(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://ann:secret@host:8080/path@x", "https://host:8080/path@x"),
        ("postgresql+psycopg2://ann:p@ss@host/db", "postgresql+psycopg2://host/db"),
        ("sqlite:////srv/a b@c/m.db", "sqlite:////srv/a b@c/m.db"),
        ("databricks", "databricks"),
    ],
)
def test_no_password_is_shown(uri, shown):
    assert store.without_password(uri) == shown


def test_the_users_own_settings_of_the_client_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "37")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    store.set_client_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "37"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_a_database_appears_whole_and_an_existing_one_is_left_alone(empty_database, tmp_path):
    assert [path.name for path in empty_database.parent.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(empty_database) as connection:
        assert connection.execute("select count(*) from alembic_version").fetchone() == (1,)
    mine = tmp_path / "mine.db"
    mine.write_text("not ours to touch")
    store.create_database(mine)
    assert mine.read_text() == "not ours to touch"


def test_importing_the_room_imports_neither_mlflow_nor_torch():
    code = "import sys, ssl_ae.tracking, ssl_ae.tracking.serving; print({'mlflow', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_telemetry_is_off_unless_it_was_turned_on():
    code = """
from ssl_ae.tracking import store
store.set_client_defaults()
from mlflow.telemetry.client import get_telemetry_client
from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
print(MLFLOW_DISABLE_TELEMETRY.get(), get_telemetry_client())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "True None\n"
