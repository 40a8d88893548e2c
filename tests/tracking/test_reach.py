"""Whether a store answers, asked without mlflow."""

import http.server
import socket
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest

from ssl_ae.tracking import Unreachable, reach


@contextmanager
def answering(code):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.asked
        finally:
            server.shutdown()


@pytest.mark.parametrize(("code", "said"), [(200, "answers (200)"), (401, "answers (401 Unauthorized)")])
def test_a_server_that_answers(code, said):
    with answering(code) as (address, asked):
        assert reach(f"{address}/", 5) == said
        assert reach(address.replace("//", "//ann:secret@"), 5) == said
        assert asked == ["/health"] * 2


def test_a_server_that_fails():
    with answering(503) as (address, _), pytest.raises(Unreachable, match="503 Service Unavailable"):
        reach(address, 5)


def test_nobody_listens(closed_port):
    for scheme in ("http", "postgresql+psycopg2"):
        with pytest.raises(Unreachable, match="Connection refused"):
            reach(f"{scheme}://ann:secret@127.0.0.1:{closed_port}/db", 5)


def test_one_that_accepts_and_never_answers_is_given_up_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(Unreachable, match="timed out"):
            reach(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3)
        assert time.monotonic() - begun < 3
        assert reach(f"mysql://127.0.0.1:{silent.getsockname()[1]}/db", 5) == "the database's port answers"


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "somewhere://host/db"])
def test_what_only_mlflow_knows_how_to_reach_is_left_to_it(uri):
    assert reach(uri, 1).startswith("not asked")


def test_a_store_in_a_file(tmp_path):
    path = tmp_path / "runs" / "odd name%20.db"
    uri = f"sqlite:///{path}"
    assert reach(uri, 1) == "will be made by the first run"
    assert not path.parent.exists()
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        with pytest.raises(Unreachable, match="no such table"):
            reach(uri, 1)
        connection.execute("create table runs (run_uuid text)")  # as in MLflow's first migration
        connection.execute("insert into runs values ('a')")
        connection.commit()
        assert reach(uri, 1) == "1 run"
    path.write_bytes(b"no database at all, though longer than the header of one " * 99)
    with pytest.raises(Unreachable, match="not a database"):
        reach(uri, 1)
