import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_ae.errors import SslAeError
from ssl_ae.tracking.journal import Cursor, Journal, as_json_number, rank_file, rank_files, read_events

ROOT = Path(__file__).parents[2]


def events(path, offset=0):
    return [event for event, _ in read_events(path, offset)]


def test_events_come_back_in_order_and_from_any_offset(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    for step in range(3):
        journal.append("metrics", step=step, values={"train/loss": step / 7})
    journal.close()
    read = list(read_events(journal.path))
    assert [event["step"] for event, _ in read] == [0, 1, 2]
    assert read[-1][1] == journal.path.stat().st_size
    assert [event["step"] for event in events(journal.path, read[0][1])] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"event": "metr', b"x" * 200_000, b""])
def test_a_torn_last_line_is_not_read_and_is_cut_off_by_the_next_writer(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    first = Journal(path)
    first.append("metrics", step=0, values={})
    first.close()
    complete = path.read_bytes()
    path.write_bytes(complete + torn)
    assert len(events(path)) == 1
    second = Journal(path)
    assert path.read_bytes() == complete
    second.append("metrics", step=1, values={})
    second.close()
    assert [event["step"] for event in events(path)] == [0, 1]


def test_a_journal_that_is_one_torn_line_is_emptied(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b"y" * 200_001)  # more than one piece of the backward search
    Journal(path).close()
    assert path.read_bytes() == b""


def test_an_unreadable_line_is_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'\xff\x00 no json\n[1]\n{"event": "later"}\n')
    assert events(path) == [None, None, {"event": "later"}]


@pytest.mark.parametrize("offset", [10_000, 7])
def test_an_offset_beyond_the_end_or_within_a_line_begins_again(tmp_path, offset):
    path = tmp_path / "j.jsonl"
    path.write_text('{"event": "later"}\n')
    assert events(path, offset) == [{"event": "later"}]


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "metrics", "time": 1, "step": 1}',
        '{"event": "metrics", "time": 1, "step": 1.5, "values": {}}',
        '{"event": "metrics", "time": 1, "step": 1, "values": {"train/loss": "no number"}}',
        '{"event": "metrics", "time": 1, "step": 1, "values": {"train/loss": null}}',
        '{"event": "close", "time": 1, "status": ["FINISHED"]}',
        '{"event": ["close"]}',
        "[" * 100_000,
    ],
)
def test_a_line_that_cannot_be_delivered_counts_as_unreadable(tmp_path, line):
    path = tmp_path / "j.jsonl"
    path.write_text(f'{line}\n{{"event": "later"}}\n')
    assert events(path) == [None, {"event": "later"}]


def test_a_full_disk_is_one_clear_error_and_leaves_complete_lines(tmp_path):
    limit = 4_096  # bytes a file of the child may have
    child = f"""
import resource
from pathlib import Path
from ssl_ae.errors import SslAeError
from ssl_ae.tracking.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
journal = Journal(Path("j.jsonl"))
try:
    while True:
        journal.append("metrics", step=1, values={{"train/loss": 0.5}})
except SslAeError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True, env=environment)
    assert "cannot write the journal j.jsonl: File too large" in done.stdout
    content = (tmp_path / "j.jsonl").read_bytes()
    line = content.index(b"\n") + 1
    assert len(content) == limit // line * line  # as many whole lines as fit, by hand
    assert all(json.loads(text)["step"] == 1 for text in content.splitlines())


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "journal").write_text("a file where the folder should be")
    with pytest.raises(SslAeError, match="cannot create the folder"):
        Journal(rank_file(tmp_path, 0))


def test_ranks_are_ordered_as_numbers(tmp_path):
    for rank in (10, 2, 0):
        Journal(rank_file(tmp_path, rank)).close()
    assert [path.name for path in rank_files(tmp_path)] == ["rank-0.jsonl", "rank-2.jsonl", "rank-10.jsonl"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1 / 3])
def test_numbers_survive_strict_json(value):
    text = json.dumps(as_json_number(value), allow_nan=False)
    assert repr(float(json.loads(text))) == repr(value)


def test_the_cursor_keeps_each_store_apart_and_survives_damage(tmp_path):
    for store, run_id in (("sqlite:////a.db", "11"), ("http://host", "22")):
        cursor = Cursor(tmp_path, store)
        cursor.run_id, cursor.offsets = run_id, {"rank-0.jsonl": 17}
        cursor.save()
    assert Cursor(tmp_path, "sqlite:////a.db").run_id == "11"
    assert Cursor(tmp_path, "http://host").offsets == {"rank-0.jsonl": 17}
    for damage in ('{"http', "[]", '{"http://host": 3}', '{"http://host": {"run_id": "22", "offsets": {"rank-0.jsonl": "17"}}}'):
        (tmp_path / "journal" / "cursor.json").write_text(damage)
        cursor = Cursor(tmp_path, "http://host")
        assert (cursor.run_id, cursor.offsets) == (None, {})
    cursor.save()
