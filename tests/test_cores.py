"""How many cores there are to use: by the scheduler's mask and by a container's quota."""

import os

import pytest

from ssl_ae import cores


@pytest.mark.parametrize(
    ("quota", "usable"),
    [
        ("max 100000", 7.0),
        ("250000 100000", 2.5),  # docker run --cpus 2.5
        ("50000 100000", 0.5),
        ("1100000 100000", 7.0),  # a container may have more time than cores
        (None, 7.0),
    ],
)
def test_the_smaller_of_mask_and_quota(tmp_path, monkeypatch, quota, usable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.usable_cores() == usable


def test_where_there_is_no_mask(tmp_path, monkeypatch):
    """macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 13)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    assert cores.usable_cores() == 13.0
