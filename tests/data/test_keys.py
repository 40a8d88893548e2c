"""Keys as compact arrays: Python's own strings, sets and dicts are the oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_ae.data import keys as rooms
from ssl_ae.data.keys import NumberedKeys, as_keys, repeated, rows_of

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(TEXT, unique=True, max_size=30), st.lists(TEXT, max_size=30))
def test_keys_are_found_where_they_stand(among, wanted):
    wanted += among[::2]
    expected = [among.index(key) if key in among else -1 for key in wanted]
    assert rows_of(as_keys(wanted), as_keys(among)).tolist() == expected


@given(st.lists(st.lists(TEXT, max_size=8), max_size=4))
def test_a_repetition_is_one_over_all_parts(parts):
    together = [key for part in parts for key in part]
    found = repeated([as_keys(part) for part in parts])
    assert (found is None) == (len(set(together)) == len(together))
    assert found is None or together.count(found) > 1


def test_keys_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(rooms, "_hashes", lambda keys: np.zeros(len(keys), dtype=np.int64))
    among = as_keys(["a", "b", "c"])
    assert repeated([among]) is None
    assert rows_of(as_keys(["c", "d", "a"]), among).tolist() == [2, -1, 0]


def test_a_stretch_of_a_table_is_found_without_a_search(monkeypatch):
    monkeypatch.setattr(rooms, "_hashes", lambda keys: pytest.fail("keys that lie together were hashed"))
    assert rows_of(as_keys(["b", "c"]), as_keys(["a", "b", "c", "d"])).tolist() == [1, 2]


def test_numbered_keys_are_made_when_asked():
    keys = NumberedKeys("train", 12)
    assert list(keys) == keys[:] == [f"train-{row:08d}" for row in range(12)]
    assert (len(keys), keys[3], keys[-1]) == (12, "train-00000003", "train-00000011")
    assert keys[4:6] == ["train-00000004", "train-00000005"]
    with pytest.raises(IndexError):
        keys[12]
