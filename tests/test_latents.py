"""The latents table by itself: parts, manifest, and what a reader refuses."""

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from ssl_ae import files, latents
from ssl_ae.errors import DataError

FACTS = {"recipe_fingerprint": "f", "scores": "false"}


def write(folder, rows, k=5, task="classes"):
    rng = np.random.default_rng(0)
    keys = np.array([f"key-{row}" for row in range(rows)], dtype=object)
    labels = rng.integers(-1, 3, rows) if task == "classes" else rng.normal(size=(rows, 2)).astype(np.float32)
    z = rng.normal(size=(rows, k)).astype(np.float32)
    for i, part in enumerate(latents.parts_of(rows)):
        at = np.asarray(part)
        latents.write_part(latents.part_of(folder, i), {"key": keys[at], "label": labels[at], "latent": z[at]}, FACTS)
    latents.finish(folder, rows, FACTS, task)
    return keys, labels, z


def test_parts_cover_every_row_once_and_do_not_depend_on_ranks():
    parts = latents.parts_of(40_009)
    assert [len(part) for part in parts] == [16_384, 16_384, 7_241]
    assert [row for part in parts for row in part] == list(range(40_009))
    assert latents.parts_of(0) == []


@pytest.mark.parametrize("task", ["classes", "regression"])
def test_what_is_written_is_read(tmp_path, task):
    keys, labels, z = write(tmp_path / "train", 20_011, task=task)
    found = latents.read(tmp_path / "train")
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.z, z)
    assert found.metadata == FACTS


def test_unknown_labels_are_null(tmp_path):
    _, labels, _ = write(tmp_path / "train", 101)
    assert pq.read_table(tmp_path / "train" / "part-00000.parquet")["label"].null_count == (labels == -1).sum() > 0


def test_a_table_without_manifest_is_not_finished(tmp_path):
    write(tmp_path / "run" / "latents" / "train", 7)
    (tmp_path / "run" / "latents" / "train" / latents.MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds no finished latents\. Run `ssl-ae extract .*run`\."):
        latents.read(tmp_path / "run" / "latents" / "train")


def test_missing_rows_are_noticed(tmp_path):
    write(tmp_path, 20_011)
    short = tmp_path / "part-00001.parquet"
    pq.write_table(pq.read_table(short).slice(0, 100), short)
    with pytest.raises(DataError, match=r"part-00001.parquet is damaged: its footer .* remove it and the _manifest.json"):
        latents.read(tmp_path)
    manifest = files.read_json(tmp_path / latents.MANIFEST)
    manifest.pop("footers_sha256")  # of a table that was written before there were any
    files.write_json(tmp_path / latents.MANIFEST, manifest)
    with pytest.raises(DataError, match=r"16484 rows, but its manifest says 20011\. Remove that and extract again\."):
        latents.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 3}'])
def test_a_damaged_manifest_is_no_manifest(tmp_path, content):
    write(tmp_path, 1_009)
    (tmp_path / latents.MANIFEST).write_text(content)
    assert not latents.is_current(tmp_path, {})
    with pytest.raises(DataError, match=r"_manifest\.json (cannot be read|is damaged).* Run `ssl-ae extract "):
        latents.read(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    write(tmp_path, 1_009)
    path = tmp_path / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError):
        latents.read(tmp_path)


def test_a_shorter_table_leaves_no_part_of_the_longer(tmp_path):
    write(tmp_path, 20_011)
    write(tmp_path, 1_009)
    assert {path.name for path in tmp_path.iterdir()} == {"part-00000.parquet", latents.MANIFEST}


def test_currency(tmp_path):
    assert not latents.is_current(tmp_path, FACTS)
    write(tmp_path, 7)
    assert latents.is_current(tmp_path, FACTS)
    assert not latents.is_current(tmp_path, FACTS | {"scores": "true"})


def test_others_read_the_folder_while_it_is_written(tmp_path):
    """Parts appear by a rename, and all else begins with a dot or an underscore, which Arrow skips."""
    write(tmp_path, 20_011)
    (tmp_path / latents.MANIFEST).unlink()
    (tmp_path / ".part-00002.parquet.0a1b2c3d.tmp").write_bytes(b"half a file")
    assert pyarrow.dataset.dataset(tmp_path).count_rows() == 20_011
