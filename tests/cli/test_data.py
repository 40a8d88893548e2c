"""data pack, data inspect and data list."""

import shutil

import pytest
from command_line import call, snapshot
from PIL import Image


def test_packing_twice_gives_the_same_bytes_and_then_skips(here, digits):
    assert call("data", "pack", "digits", "one", "--json").json["status"] == "done"
    assert snapshot(here / "one") == snapshot(digits)
    assert call("data", "pack", "digits", "one", "--json").json["status"] == "skipped"
    assert snapshot(here / "one") == snapshot(digits)


def test_another_data_set_is_replaced_only_when_asked(here):
    (here / "a.csv").write_text("x,y\n" + "1,2\n" * 20)
    (here / "b.csv").write_text("x,y\n" + "1,3\n" * 20)
    assert call("data", "pack", "a.csv", "out").code == 0
    before = snapshot(here / "out")
    refused = call("data", "pack", "b.csv", "out")
    assert refused.code == 2
    assert "--overwrite" in refused.stderr
    assert snapshot(here / "out") == before
    assert call("data", "pack", "b.csv", "out", "--overwrite", "--json").json["status"] == "done"
    assert snapshot(here / "out") != before


def test_images_of_mixed_size_with_size(here):
    for i in range(20):
        folder = here / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 7), (i, 0, 0)).save(folder / f"{i}.png")
    answer = call("data", "pack", "photos", "out", "--size", "11x13")
    assert answer.code == 0
    assert "photos: image (3, 11, 13) uint8, 2 classes, train 18, val 2" in answer.stderr


def test_inspect_counts_and_draws(here, digits):
    data = shutil.copytree(digits, here / "digits")
    answer = call("data", "inspect", data, "--json").json
    report = answer["report"]
    assert report["damaged"] == []
    assert {shard["verdict"] for shard in report["shards"]} == {"ok"}
    assert {name: split["rows"] for name, split in report["splits"].items()} == {"train": 1298, "val": 144, "test": 355}
    assert sum(report["splits"]["test"]["classes"].values()) == 355
    with Image.open(answer["outputs"]["picture"]) as picture:
        assert picture.format == "PNG"
    assert call("data", "inspect", data, "--out", "picture.png").code == 0
    assert (here / "picture.png").exists()


def test_inspect_shows_it_to_people(digits, here):
    answer = call("data", "inspect", digits, "--out", "p.png")
    assert "digits: image (1, 8, 8) uint8 in [0, 16], from sklearn:digits" in answer.stderr
    assert "train-000000.tar" in answer.stderr
    assert answer.stdout == "picture: p.png\n"


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_inspect_finds_damage(here, digits, damage):
    data = shutil.copytree(digits, here / "digits")
    shard = data / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1  # a pixel: no header tells, the checksum does
    shard.write_bytes(content[:-3_000] if damage == "truncated" else content)
    answer = call("data", "inspect", data)
    assert answer.code == 2
    assert answer.stderr.splitlines()[-1] == f"error: {data} is damaged: train-000000.tar. Pack the source again."
    assert not (data / "_samples.png").exists()


def test_list(here, digits):
    shutil.copytree(digits, here / "data" / "digits")
    answer = call("data", "list")
    assert answer.stdout == "data/digits  image (1, 8, 8)  train 1,298, val 144, test 355\n"
    (found,) = call("data", "list", "--json").json["data"]
    assert found == {"name": "digits", "path": "data/digits", "rows": {"train": 1298, "val": 144, "test": 355}}


def test_nothing_to_list(here):
    answer = call("data", "list")
    assert (answer.code, answer.stdout) == (0, "")
    assert answer.stderr == "no data set under data. Make one with `ssl-ae data pack SOURCE data/NAME`.\n"
