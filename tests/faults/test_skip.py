"""`data.damaged: skip`: what is left is exactly the sound samples, in the same order for everybody, and the rest is counted."""

import json

import numpy as np
import pyarrow.dataset
import pytest
from command_line import call, one_line, spawn, with_fields, write_yaml
from faults.shard_kit import ROWS, change, flip, npy, packed, picture, pictures, png, read_all, values, write_tar

from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import DataError

SKIP = Tolerance(skip=True, limit=0.5)


def test_a_damaged_shard_of_blocks_is_left_out_whole(tmp_path):
    packed(tmp_path)
    change(tmp_path / "train-000001.tar", flip(3000))
    data = DataSet.open(tmp_path, tolerance=SKIP)
    left = [*range(14), *range(28, ROWS)]  # shards of 14, 14 and 13 rows
    keys, x = read_all(data)["train"]
    assert keys == [f"train-{row}" for row in left]
    np.testing.assert_array_equal(x, values(ROWS)[left])
    (line,) = data.losses
    assert "left out 14 of 41 samples of train" in line
    assert "train-000001.tar is damaged: its sha256 is not the card's" in line
    assert data.card.left_out == {"train-000001.tar": None}
    assert data.card.fingerprint != DataSet.open(tmp_path, verify="none").card.fingerprint
    assert DataSet.open(tmp_path, tolerance=SKIP).card == data.card  # remembered or read again


@pytest.mark.parametrize("how", [lambda content: content[:-600], None])
def test_a_truncated_or_absent_shard_is_left_out_too(tmp_path, how):
    path = packed(tmp_path) / "train-000002.tar"
    if how:
        change(path, how)
    else:
        path.unlink()
    data = DataSet.open(tmp_path, tolerance=SKIP)
    assert data.split("train").keys.tolist() == [f"train-{row}" for row in range(28)]
    assert "left out 13 of 41 samples of train" in data.losses[0]


def test_a_shard_is_read_to_its_end_once(tmp_path, monkeypatch):
    packed(tmp_path)
    monkeypatch.setattr("ssl_ae.data.damage.SETTLED_NS", 0)
    DataSet.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ssl_ae.files.sha256_of", lambda path: pytest.fail("hashed again"))
        DataSet.open(tmp_path)
    change(tmp_path / "train-000001.tar", flip(3000))
    with pytest.raises(DataError, match=r"train-000001\.tar is damaged"):
        DataSet.open(tmp_path)


def test_more_damage_than_the_limit_is_an_error(tmp_path):
    packed(tmp_path)
    change(tmp_path / "train-000001.tar", flip(3000))
    with pytest.raises(DataError, match=r"14 of 41 samples of train are damaged; data.damaged_limit = 0.3 lets 12 be left out"):
        DataSet.open(tmp_path, tolerance=Tolerance(skip=True, limit=0.3))
    with pytest.raises(DataError, match=r"train-000001\.tar is damaged"):
        DataSet.open(tmp_path)
    change(tmp_path / "val-000000.tar", flip(3000))
    with pytest.raises(DataError, match="9 of 9 samples of val are damaged"):
        DataSet.open(tmp_path, tolerance=Tolerance(skip=True, limit=1))  # nothing would be left


def damaged_pictures(folder):
    """Two shards of 30 pictures; six samples are bad, each in its own way, and a third shard is cut."""
    first = pictures(range(30))
    first["003.png"] = b"no image"
    first["007.png"] = png(picture(7))[:-20]
    first["011.png"] = png(np.zeros((6, 4), np.uint8))
    first["013.png"] = png(np.zeros((4, 6), np.uint16))
    del first["017.png"]
    first.pop("019.cls")
    first["019.json"] = b'{"label": '
    write_tar(folder / "a.tar", first)
    write_tar(folder / "b.tar", pictures(range(30, 60)))
    path = write_tar(folder / "c.tar", pictures(range(60, 90)))
    path.write_bytes(path.read_bytes()[:20_000])
    return [row for row in range(60) if row not in (3, 7, 11, 13, 17, 19)]


def test_bad_samples_of_other_makers_are_left_out_one_by_one(tmp_path):
    good = damaged_pictures(tmp_path)
    with pytest.raises(DataError, match=r"a\.tar: sample 017 has \.cls"):
        DataSet.open(tmp_path)
    data = DataSet.open(tmp_path, tolerance=SKIP)
    found = {}
    for name in ("train", "val"):
        split, labels = data.split(name), data.labels(name)
        for row, key in enumerate(split.keys):
            np.testing.assert_array_equal(split.read(np.array([row]))[0, 0], picture(int(key)))
            assert labels[row] == int(key) % 2
            found[key] = name
    assert sorted(found) == [f"{row:03d}" for row in good]
    assert data.split("val").rows == len(good) // 10
    assert data.card.left_out == {"a.tar": (3, 7, 11, 13, 17, 19), "c.tar": None}
    (line,) = data.losses
    assert "left out 36 of 90 samples of train" in line  # six, and as many as the bytes of the third shard hold elsewhere
    assert "sample 003: the image is damaged" in line
    assert "(and 4 more)" in line
    assert DataSet.open(tmp_path, tolerance=SKIP).card == data.card


def test_what_was_found_is_remembered_until_the_shard_changes(tmp_path, monkeypatch):
    damaged_pictures(tmp_path)
    monkeypatch.setattr("ssl_ae.data.damage.SETTLED_NS", 0)
    before = DataSet.open(tmp_path, tolerance=SKIP)
    with monkeypatch.context() as patch:
        patch.setattr("ssl_ae.data.shards.ShardReader.damage", lambda reader: pytest.fail("read again"))
        patch.setattr("ssl_ae.files.sha256_of", lambda path: pytest.fail("hashed again"))
        again = DataSet.open(tmp_path, tolerance=SKIP)
    assert (again.card, again.losses) == (before.card, before.losses)
    write_tar(tmp_path / "a.tar", pictures(range(30)))
    assert DataSet.open(tmp_path, tolerance=SKIP).card.left_out == {"c.tar": None}


def test_floats_that_are_none_are_left_out(tmp_path):
    x = values(20)
    x[4, 1, 1] = np.nan
    write_tar(tmp_path / "train.tar", {f"{row:02d}.npy": npy(x[row]) for row in range(20)})
    data = DataSet.open(tmp_path, tolerance=SKIP)
    assert sorted([*data.split("train").keys, *data.split("val").keys]) == [f"{row:02d}" for row in range(20) if row != 4]
    assert np.isfinite(data.card.x.range).all()


def test_a_set_without_a_sound_sample_says_why(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"no image", "b.png": b"none either"})
    with pytest.raises(DataError, match=r"no shard holds a sample that can be read\. .*the image is damaged"):
        DataSet.open(tmp_path, tolerance=SKIP)


# --- through the command line


TREE = {
    "name": "tiny",
    "data": {"path": "shards", "damaged": "skip", "damaged_limit": 0.5},
    "model": {"latent_dim": 2, "encoder": {"name": "mlp", "widths": [5]}},
    "pretrain": {"epochs": 1, "batch_size": 16},
    "finetune": {"epochs": 1, "batch_size": 16, "baselines": False},
    "device": "cpu",
}


def extracted_keys(here) -> list[str]:
    tables = (pyarrow.dataset.dataset(here / "runs/tiny/latents" / split).to_table() for split in ("train", "val"))
    return sorted(key for table in tables for key in table.column("key").to_pylist())


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_samples(here):
    (here / "shards").mkdir()
    good = damaged_pictures(here / "shards")
    path = write_yaml(here / "recipe.yaml", TREE)
    answer = spawn("run", path, "--json", "--set", "stages=[pretrain, extract]", "--nproc", "2")
    assert answer.code == 0, answer.stderr
    assert extracted_keys(here) == [f"{row:03d}" for row in good]
    assert call("pretrain", path, "--out", "runs/one").code == 0
    assert json.loads((here / "runs/one/card.json").read_text()) == json.loads((here / "runs/tiny/card.json").read_text())


def test_every_stage_reads_the_same_sound_samples_and_every_key_is_extracted_once(here):
    (here / "shards").mkdir()
    good = damaged_pictures(here / "shards")
    path = write_yaml(here / "recipe.yaml", TREE)
    answer = call("pretrain", path, "--json").json
    assert len(answer["warnings"]) == 1
    assert "left out 36 of 90 samples of train" in answer["warnings"][0]
    assert call("extract", "runs/tiny").code == 0
    assert extracted_keys(here) == [f"{row:03d}" for row in good]
    assert call("finetune", path).code == 0
    card = json.loads((here / "runs/tiny/card.json").read_text())
    assert card["left_out"] == {"a.tar": [3, 7, 11, 13, 17, 19], "c.tar": None}
    # more damage later is other data: nothing goes on with other rows in silence
    write_tar(here / "shards" / "b.tar", {**pictures(range(30, 60)), "044.png": b"no image"})
    assert "is not the data this run was made with" in one_line("extract", "runs/tiny")
    strict = write_yaml(here / "strict.yaml", with_fields(TREE, {"data.damaged_limit": 0.01}))
    assert "data.damaged_limit = 0.01 lets 0 be left out" in one_line("pretrain", strict, "--out", "runs/other")
