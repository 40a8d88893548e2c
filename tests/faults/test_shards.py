"""Damaged shards: each kind of damage is found, the shard is named, and with `data.damaged: skip` exactly it is left out."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, one_line, write_yaml
from faults.shard_kit import (
    SIGNAL,
    bomb_png,
    change,
    flip,
    members_of,
    npy,
    packed,
    picture,
    pictures,
    png,
    read_all,
    values,
    write_tar,
)

from ssl_ae import files
from ssl_ae.data.card import Card, Shard, Split, X
from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Draw, Feed, Scaling
from ssl_ae.data.shards import ShardWriter
from ssl_ae.errors import DataError

SKIP = Tolerance(skip=True, limit=0.6)
BAD = "train-000001.tar"  # of three: rows 14 to 27 of 41


def start_of(path: Path, member: int) -> int:
    """Where the header of a member begins."""
    return members_of(path)[member].offset


def data_of(path: Path, member: int) -> int:
    return members_of(path)[member].offset_data


# What is done to the second shard of blocks. The card still says what it was.
BLOCK_DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut in data": lambda path: change(path, lambda c: c[: data_of(path, 2) + 40]),
    "cut in a header": lambda path: change(path, lambda c: c[: start_of(path, 2) + 100]),
    "cut between members": lambda path: change(path, lambda c: c[: start_of(path, 2)]),
    "cut between blocks, and closed as an archive": lambda path: change(path, lambda c: c[: start_of(path, 2)] + bytes(10240)),
    "cut in the end": lambda path: change(path, lambda c: c[:-512]),
    "longer by a block": lambda path: change(path, lambda c: c + bytes(512)),
    "a bit of a header": lambda path: change(path, flip(start_of(path, 1) + 3)),
    "a bit of a size": lambda path: change(path, flip(start_of(path, 2) + 130)),
    "a bit of a checksum": lambda path: change(path, flip(start_of(path, 2) + 150)),
    "a bit of a sample": lambda path: change(path, flip(data_of(path, 2) + 200)),
    "a bit of an npy header": lambda path: change(path, flip(data_of(path, 2) + 60)),
    "a bit of a key": lambda path: change(path, flip(data_of(path, 1) + 8)),
    "a bit of the padding": lambda path: change(path, flip(start_of(path, 2) - 1)),
    "a bit after the end": lambda path: change(path, flip(-1)),
    "a block of zeros": lambda path: change(path, lambda c: c[:1024] + bytes(512) + c[1536:]),
    "two blocks exchanged": lambda path: change(path, lambda c: c[:512] + c[1024:1536] + c[512:1024] + c[1536:]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "another shard": lambda path: path.write_bytes(path.with_name("train-000000.tar").read_bytes()),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", BLOCK_DAMAGE)
def test_a_damaged_shard_of_blocks(tmp_path, damage):
    before = read_all(DataSet.open(packed(tmp_path)))
    BLOCK_DAMAGE[damage](tmp_path / BAD)
    with pytest.raises(DataError, match=rf"{BAD}"):
        DataSet.open(tmp_path)
    data = DataSet.open(tmp_path, tolerance=SKIP)
    keys, x = read_all(data)["train"]
    left = [*range(14), *range(28, 41)]
    assert keys == [before["train"][0][row] for row in left]
    np.testing.assert_array_equal(x, before["train"][1][left])
    assert "left out 14 of 41 samples of train" in data.losses[0]
    assert BAD in data.losses[0]


def rewritten(folder: Path, members: dict[str, bytes] | bytes, rows: int = 14) -> None:
    """Another shard in place of the second, and the card says it has always been so: only what it holds can tell."""
    path = folder / BAD
    if isinstance(members, bytes):
        path.write_bytes(members)
    else:
        write_tar(path, members)
    entry = Shard(file=BAD, rows=rows, bytes=path.stat().st_size, sha256=files.sha256_of(path))
    card = Card.load(folder)
    shards = tuple(entry if shard.file == BAD else shard for shard in card.splits["train"].shards)
    splits = {**card.splits, "train": Split(rows=sum(shard.rows for shard in shards), shards=shards)}
    card.model_copy(update={"splits": splits}).save(folder)


KEYS = json.dumps([f"k{row}" for row in range(14)]).encode()
BAD_BLOCKS: dict[str, tuple[dict[str, bytes] | bytes, int]] = {
    "another shape": ({"0.x.npy": npy(np.zeros((14, 5, 3), np.float32)), "0.key.json": KEYS}, 14),
    "another dtype": ({"0.x.npy": npy(np.zeros((14, 3, 5), np.uint8)), "0.key.json": KEYS}, 14),
    "doubles": ({"0.x.npy": npy(np.zeros((14, 3, 5))), "0.key.json": KEYS}, 14),
    "no samples beside the keys": ({"0.key.json": KEYS}, 14),
    "no keys beside the samples": ({"0.x.npy": npy(values(14)), "1.key.json": KEYS}, 14),
    "fewer samples than the card says": ({"0.x.npy": npy(values(13)), "0.key.json": KEYS}, 14),
    "fewer keys than samples": ({"0.x.npy": npy(values(14)), "0.key.json": b'["a"]'}, 14),
    "keys that are numbers": ({"0.x.npy": npy(values(14)), "0.key.json": json.dumps([*range(14)]).encode()}, 14),
    "keys that are no JSON": ({"0.x.npy": npy(values(14)), "0.key.json": b"\xff"}, 14),
    "keys nested a hundred thousand deep": ({"0.x.npy": npy(values(14)), "0.key.json": b"[" * 100_000}, 14),
    "objects": ({"0.x.npy": npy(np.array([{}] * 14, dtype=object)), "0.key.json": KEYS}, 14),
    "a pickle": ({"0.x.npy": pickle.dumps(values(14)), "0.key.json": KEYS}, 14),
    "an archive of nothing": (bytes(10240), 14),
    "an archive of nothing that should have none": (bytes(10240), 0),
    "no bytes at all": (b"", 0),
    "no archive": (b"\x1f\x8b" + bytes(5000), 14),
}


@pytest.mark.parametrize("what", BAD_BLOCKS)
def test_a_shard_whose_checksum_holds_but_whose_blocks_are_wrong(tmp_path, what):
    rewritten(packed(tmp_path), *BAD_BLOCKS[what])
    with pytest.raises(DataError, match=rf"{BAD}"):
        read_all(DataSet.open(tmp_path))


# Members in place of those of row 13 of a shard of 20 pictures, with what the message says
BAD_SAMPLES: dict[str, tuple[dict[str, bytes], str]] = {
    "no image": ({"013.png": b"no image"}, "the image is damaged"),
    "an empty image": ({"013.png": b""}, "the image is damaged"),
    "half an image": ({"013.png": png(picture(13))[:60]}, "the image is damaged"),
    "an image without its end": ({"013.png": png(picture(13))[:-12]}, "the image is damaged"),
    "a bit of the pixels": ({"013.png": bytes(flip(-20)(bytearray(png(picture(13)))))}, "the image is damaged"),
    "a bit of the width": ({"013.png": bytes(flip(19)(bytearray(png(picture(13)))))}, "the image is damaged"),
    "half a jpeg": ({"013.png": png(np.zeros((40, 60), np.uint8), "JPEG")[:300]}, "sample 013"),
    "a decompression bomb": ({"013.png": bomb_png()}, "the image is damaged"),
    "a smaller bomb": ({"013.png": bomb_png(9_000)}, "is uint8 (1, 9000, 9000)"),
    "a gif": ({"013.png": png(picture(13), "GIF")}, "the image is damaged"),
    "sixteen bits": ({"013.png": png(np.zeros((4, 6), np.uint16))}, "more than 8 bits"),
    "another size": ({"013.png": png(np.zeros((6, 4), np.uint8))}, "(1, 6, 4), but the data set holds uint8 (1, 4, 6)"),
    "floats": ({"013.npy": npy(np.zeros((1, 4, 6), np.float32))}, "is float32"),
    "objects": ({"013.npy": npy(np.array([{}], dtype=object))}, "never unpickled"),
    "a pickle": ({"013.npy": pickle.dumps([1])}, "the .npy member is damaged"),
    "an npy without its data": ({"013.npy": npy(picture(13))[:-5]}, "the .npy member of"),
    "an npy that promises more than there is": ({"013.npy": npy(picture(13)).replace(b"(4, 6)", b"(9**9)")}, "the .npy member"),
    "an npy of a terabyte": ({"013.npy": npy(picture(13)).replace(b"(4, 6), }  ", b"(10**12,)}")}, "the .npy member"),
    "brackets without end": ({"013.npy": b"\x93NUMPY\x01\x00" + (4000).to_bytes(2, "little") + b"(" * 4000}, "the .npy member"),
    "numbers without end": (
        {"013.npy": b"\x93NUMPY\x01\x00" + (4000).to_bytes(2, "little") + b"-" * 3999 + b"1"},
        "the .npy member",
    ),
    "only a label": ({"013.cls": b"1"}, "sample 013"),
    "only a text": ({"013.txt": b"a picture"}, "sample 013"),
    "an image and an array": ({"013.png": png(picture(13)), "013.npy": npy(picture(13))}, "sample 013"),
    "a label that is no JSON": ({"013.png": png(picture(13)), "013.json": b'{"label"'}, "the .json member is damaged"),
    "a label nested too deep": ({"013.png": png(picture(13)), "013.json": b"[" * 100_000}, "the .json member is damaged"),
    "a label that is an object": ({"013.png": png(picture(13)), "013.json": b'{"label": {}}'}, "label = {}"),
    "a number of ten thousand digits": ({"013.png": png(picture(13)), "013.cls": b"9" * 10_000}, "sample 013"),
    "another of ten thousand digits": (
        {"013.png": png(picture(13)), "013.json": b'{"label": ' + b"9" * 10_000 + b"}"},
        "the .json member is damaged",
    ),
}


def with_sample(members: dict[str, bytes]) -> dict[str, bytes]:
    others = {name: content for name, content in pictures(range(20)).items() if not name.startswith("013")}
    return others | members


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_a_bad_sample_of_other_makers(tmp_path, what):
    members, complaint = BAD_SAMPLES[what]
    write_tar(tmp_path / "a.tar", pictures(range(20, 40)))
    write_tar(tmp_path / "b.tar", with_sample(members))
    with pytest.raises(DataError, match=r"b\.tar: sample 013") as caught:
        read_all(DataSet.open(tmp_path))
    assert complaint in str(caught.value)
    data = DataSet.open(tmp_path, tolerance=SKIP)
    found = read_all(data)
    assert sorted(found["train"][0] + found["val"][0]) == [f"{row:03d}" for row in range(40) if row != 13]
    for keys, x in found.values():
        for key, sample in zip(keys, x, strict=True):
            np.testing.assert_array_equal(sample[0], picture(int(key)))
    assert "left out 1 of 40 samples of train" in data.losses[0]
    assert "b.tar: sample 013" in data.losses[0]


# What is done to the second of two shards of other makers: members are the image and the class of each row in turn
TAR_DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut in data": lambda path: change(path, lambda c: c[: data_of(path, 6) + 40]),
    "cut in a header": lambda path: change(path, lambda c: c[: start_of(path, 6) + 100]),
    "cut between members": lambda path: change(path, lambda c: c[: start_of(path, 6)]),
    "cut in the end": lambda path: change(path, lambda c: c[: start_of(path, 39) + 1024]),
    "a bit of a header": lambda path: change(path, flip(start_of(path, 7) + 3)),
    "a bit of a checksum": lambda path: change(path, flip(start_of(path, 7) + 150)),
    "a header of zeros": lambda path: change(path, lambda c: c[: start_of(path, 6)] + bytes(512) + c[start_of(path, 6) + 512 :]),
    "empty": lambda path: path.write_bytes(b""),
    "an archive of nothing": lambda path: path.write_bytes(bytes(10240)),
    "no archive": lambda path: path.write_bytes(b"no archive" * 500),
    "an archive of others' files": lambda path: write_tar(path, {".DS_Store": b"x"}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", TAR_DAMAGE)
def test_a_damaged_archive_of_other_makers(tmp_path, damage):
    write_tar(tmp_path / "a.tar", pictures(range(20, 40)))
    TAR_DAMAGE[damage](write_tar(tmp_path / "b.tar", pictures(range(20))))
    with pytest.raises(DataError, match=r"b\.tar"):
        read_all(DataSet.open(tmp_path))
    data = DataSet.open(tmp_path, tolerance=SKIP)
    found = read_all(data)
    assert sorted(found["train"][0] + found["val"][0]) == [f"{row:03d}" for row in range(20, 40)]
    assert "left out 20 of 40 samples of train" in data.losses[0]
    assert "b.tar" in data.losses[0]


# --- sets that are small, or hold nothing


def test_a_list_of_no_shards(here):
    packed(here / "set")
    card = Card.load(here / "set")
    card.model_copy(update={"splits": {**card.splits, "train": Split(rows=0, shards=())}}).save(here / "set")
    recipe = write_yaml(here / "r.yaml", {"name": "r", "data": {"path": "set"}, "device": "cpu"})
    assert one_line("pretrain", recipe) == "set: the split train holds no samples. Add some, and pack the source again."


def one_sample(folder: Path) -> Path:
    with ShardWriter(folder, "train") as writer:
        writer.write(["only"], values(1))
    with ShardWriter(folder, "val") as val:
        val.write(["other"], values(1, seed=1))
    splits = {"train": Split(rows=1, shards=writer.close()), "val": Split(rows=1, shards=val.close())}
    Card(name="one", x=SIGNAL, splits=splits).save(folder)
    return folder


def test_a_set_of_one_sample_trains_and_is_extracted(here):
    model = {"latent_dim": 2, "encoder": {"name": "mlp", "widths": [5]}, "decoder": {"name": "mlp", "likelihood": "gaussian"}}
    tree = {"name": "r", "data": {"path": str(one_sample(here / "set"))}, "model": model, "device": "cpu"}
    recipe = write_yaml(here / "r.yaml", tree | {"pretrain": {"epochs": 3, "batch_size": 4}})
    assert call("pretrain", recipe).code == 0
    assert call("extract", "runs/r", "--json").json["metrics"]["train/rows"] == 1


@pytest.mark.parametrize(("rows", "world"), [(41, 5), (3, 5), (1, 2)])
@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_fewer_shards_than_ranks_lose_nothing(tmp_path, rows, world, residency):
    """One shard, several ranks: an epoch's batches hold every sample once, whoever reads which."""
    with ShardWriter(tmp_path, "train") as writer:
        writer.write([str(row) for row in range(rows)], values(rows))
    Card(name="one", x=SIGNAL, splits={"train": Split(rows=rows, shards=writer.close())}).save(tmp_path)
    split = DataSet.open(tmp_path).split("train")
    scaling, cpu = Scaling(X(**SIGNAL.model_dump()), "none"), torch.device("cpu")
    feeds = [Feed(split, None, scaling, seed=3, device=cpu, residency=residency, rank=r, world=world) for r in range(world)]
    steps = rows  # of `world` rows each: `world` epochs
    batches = [list(feed.batches((Draw(world), k) for k in range(steps))) for feed in feeds]
    seen = [int(batch.row[0]) for step in zip(*batches, strict=True) for batch in step]
    for epoch in range(world):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == [*range(rows)]
    for rank in batches:
        for batch in rank:
            np.testing.assert_array_equal(batch.x.numpy(), values(rows)[batch.row.numpy()])
