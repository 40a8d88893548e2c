"""An extraction that is stopped goes on: parts that are whole stay, every key comes once, the bytes are those of one pass."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from command_line import call, snapshot, spawn
from faults.store_kit import answer_of_child, flip_a_bit, hidden

from ssl_ae import latents
from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import DataError

PARTS = 13  # of 100 rows: 1,298 train rows


@pytest.fixture
def parts(finetuned, monkeypatch) -> Path:
    """The train latents of runs/tiny in many parts."""
    monkeypatch.setattr(latents, "PART_ROWS", 100)
    (finetuned / "latents/train/part-00000.parquet").unlink()
    (finetuned / "latents/train/_manifest.json").unlink()
    assert call("extract", finetuned, "--split", "train").code == 0
    assert len(list((finetuned / "latents/train").glob("part-*"))) == PARTS
    return finetuned / "latents" / "train"


def stop(folder: Path, left: list[int]) -> dict[str, int]:
    """As if it had been killed when these parts were there; their inodes, by name."""
    (folder / latents.MANIFEST).unlink()
    for index in set(range(PARTS)).difference(left):
        latents.part_of(folder, index).unlink()
    return {path.name: path.stat().st_ino for path in folder.glob("part-*")}


def keys(folder: Path) -> list[str]:
    return pyarrow.dataset.dataset(folder).to_table()["key"].to_pylist()


@pytest.mark.parametrize(
    "left",
    [[], [0, 1, 2], [1, 3, 5, 7], [0, 5, 10], list(range(PARTS))],
    ids=["none", "one rank", "rank 1 of 2", "rank 0 of 5", "all"],
)
def test_it_goes_on_where_any_number_of_ranks_was_stopped(parts, digits, left):
    whole = snapshot(parts)
    before = stop(parts, left)
    assert call("extract", "runs/tiny", "--split", "train", "--json").json["status"] == "done"
    assert snapshot(parts) == whole
    assert {name: (parts / name).stat().st_ino for name in before} == before  # not made again
    assert keys(parts) == DataSet.open(digits).split("train").keys.tolist()


def test_killed_in_the_middle(parts, digits, monkeypatch):
    whole = snapshot(parts)
    stop(parts, [])
    write = latents.write_part

    def dying(path: Path, *rest: object) -> None:
        if path.name == "part-00006.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *rest)

    with pytest.raises(json.JSONDecodeError):  # it never answers
        answer_of_child(lambda: monkeypatch.setattr(latents, "write_part", dying), "extract", "runs/tiny", "--split", "train")
    assert keys(parts) == DataSet.open(digits).split("train").keys.tolist()[:600]
    answer = call("extract", "runs/tiny", "--split", "train")
    assert "which is gone: going on in its place" in answer.stderr
    assert snapshot(parts) == whole
    assert hidden(parts.parent.parent) == []


def test_scores_are_averaged_over_what_was_there_too(parts):
    first = call("extract", "runs/tiny", "--split", "train", "--scores", "--json").json["metrics"]
    stop(parts, [2, 3])
    again = call("extract", "runs/tiny", "--split", "train", "--scores", "--json").json["metrics"]
    assert again == pytest.approx(first, rel=1e-12)


def test_a_damaged_part_is_made_again_aloud(parts):
    whole = snapshot(parts)
    stop(parts, [0, 1, 2, 3])
    flip_a_bit(latents.part_of(parts, 1), 0.3)
    latents.part_of(parts, 2).write_bytes(latents.part_of(parts, 2).read_bytes()[:-100])
    answer = call("extract", "runs/tiny", "--split", "train", "--json")
    assert any("part-00001.parquet cannot be read: " in text and "It is made again." in text for text in answer.json["warnings"])
    assert snapshot(parts) == whole


@pytest.mark.slow
def test_parts_of_other_rows_or_weights_are_not_taken(parts, recipe):
    """Parts that changed places, and those of a model that was trained anew since."""
    whole = snapshot(parts)
    stop(parts, [0, 1])
    latents.part_of(parts, 0).rename(latents.part_of(parts, 2))
    assert call("extract", "runs/tiny", "--split", "train").code == 0
    assert snapshot(parts) == whole
    stop(parts, [0, 1, 2])
    assert call("pretrain", recipe({"seed": 1}), "--restart").code == 0
    assert call("extract", "runs/tiny", "--split", "train").code == 0
    assert len({latents.tables.read_metadata(path)["checkpoint_sha256"] for path in parts.glob("part-*")}) == 1
    assert not set(snapshot(parts).values()) & set(whole.values())


def flips(folder: Path, places: list[tuple[int, int]]) -> int:
    """Flip one bit of the part at a time; how many flips `latents.read` refused. The others changed nothing that it reads."""
    part = latents.part_of(folder, 0)
    whole, content = latents.read(folder), part.read_bytes()
    noticed = 0
    for at, bit in places:
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        part.write_bytes(damaged)
        try:
            found = latents.read(folder)
        except DataError:
            noticed += 1
            continue
        assert found.keys.tolist() == whole.keys.tolist(), (at, bit)
        np.testing.assert_array_equal(found.labels, whole.labels, str((at, bit)))
        np.testing.assert_array_equal(found.z, whole.z, str((at, bit)))
    part.write_bytes(content)
    return noticed


def small_table(folder: Path) -> int:
    """A finished table of one part; its size in bytes."""
    z = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    columns = {"key": np.array([f"k{i}" for i in range(11)], object), "label": np.arange(11) % 4 - 1, "latent": z}
    latents.write_part(latents.part_of(folder, 0), columns, {"fact": "1"})
    latents.finish(folder, 11, {"fact": "1"}, "classes")
    return latents.part_of(folder, 0).stat().st_size


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    size = small_table(tmp_path)
    at = np.random.default_rng(1).integers(0, size, 300).tolist()
    assert flips(tmp_path, [(place, place % 8) for place in at]) > 100


@pytest.mark.slow
def test_every_single_bit(tmp_path):
    size = small_table(tmp_path)
    flips(tmp_path, [(at, bit) for at in range(size) for bit in range(8)])


@pytest.mark.slow
def test_two_ranks_go_on_with_what_one_began(here, recipe):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_ae")
    rows = 120_000  # seven parts of train
    np.savez(here / "x.npz", x=np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32))
    assert call("data", "pack", "x.npz", "vectors").code == 0
    path = recipe(
        {
            "data": {"path": "vectors"},
            "model.encoder.widths": [7],
            "model.decoder.likelihood": "gaussian",
            "pretrain": {"epochs": 1, "batch_size": 4096},
        }
    )
    assert call("pretrain", path).code == 0
    assert call("extract", "runs/tiny", "--split", "train").code == 0
    folder = here / "runs/tiny/latents/train"
    whole = snapshot(folder)
    (folder / latents.MANIFEST).unlink()
    for index in (1, 2, 4, 5, 6):
        latents.part_of(folder, index).unlink()
    kept = {index: latents.part_of(folder, index).stat().st_ino for index in (0, 3)}
    answer = spawn("extract", "runs/tiny", "--split", "train", "--json", launcher=torchrun)
    assert answer.json["status"] == "done"
    assert snapshot(folder) == whole
    assert {index: latents.part_of(folder, index).stat().st_ino for index in kept} == kept
    assert len(set(keys(folder))) == len(keys(folder)) == rows - rows // 10
