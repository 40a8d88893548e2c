import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_kit import KINDS

from ssl_ae.data.card import Card, X
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import UNLABELED
from ssl_ae.data.pack import CHANGED, inspect, pack
from ssl_ae.data.sources import Block, Description, PackOptions, Source
from ssl_ae.errors import DataError, DiskError, SslAeError

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "mnist"
ROWS = 1097  # prime, more than a block


def packed(place, out, **options):
    overwrite, progress = options.pop("overwrite", False), options.pop("progress", None)
    return pack(str(place), out, PackOptions(**options), KINDS, progress, overwrite)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table(path, rows=ROWS, seed=0):
    """A CSV of three features, one constant, and two classes; every third row has no label."""
    numbers = np.random.default_rng(seed).normal(3, 2, (rows, 2)).astype(np.float32)
    lines = [f"{u!r},{v!r},0.1,{('' if row % 3 == 0 else 'ab'[row % 2])}" for row, (u, v) in enumerate(numbers.tolist())]
    path.write_text("u,v,c,label\n" + "\n".join(lines) + "\n")
    return numbers


class Growing(Source):
    """A source whose second reading is longer than its first, as a folder is that somebody still writes to."""

    name = "growing"
    summary = "a test"
    readings = 0

    @classmethod
    def recognises(cls, place):
        return place == "growing"

    def __init__(self, place, options): ...

    def describe(self):
        return Description("growing", X(kind="vector", dtype="float32", shape=(2,), range=(0, 1)), None, (), ("train",))

    def blocks(self, split):
        self.readings += 1
        yield Block([f"k{row}" for row in range(20 + self.readings)], self.samples(20 + self.readings), None)

    def samples(self, rows):
        return np.zeros((rows, 2), dtype=np.float32)


class TestPack:
    def test_rows_keys_and_labels_survive(self, tmp_path):
        numbers = table(tmp_path / "a.csv")
        card = packed(tmp_path / "a.csv", tmp_path / "out")
        data = DataSet.open(tmp_path / "out", verify="all")
        assert data.card == card
        assert {name: split.rows for name, split in card.splits.items()} == {"train": ROWS - 109, "val": 109}
        seen = []
        for name in ("train", "val"):
            split = data.split(name)
            rows = np.array([int(key.removeprefix("train-")) for key in split.keys])
            np.testing.assert_array_equal(split.read(np.arange(split.rows))[:, :2], numbers[rows])
            expected = [UNLABELED if row % 3 == 0 else row % 2 for row in rows]
            assert data.labels(name).tolist() == expected
            assert (np.diff(rows) > 0).all()  # the source's order
            seen += rows.tolist()
        assert sorted(seen) == list(range(ROWS))

    def test_val_is_the_first_tenth_by_sha256_of_the_key(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "out")
        keys = [f"train-{row:08d}" for row in range(ROWS)]
        first = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[: ROWS // 10]
        assert set(DataSet.open(tmp_path / "out").split("val").keys) == set(first)

    def test_mean_and_std_are_of_the_train_split_and_the_range_of_all(self, tmp_path):
        numbers = table(tmp_path / "a.csv").astype(np.float64)
        card = packed(tmp_path / "a.csv", tmp_path / "out")
        rows = [int(key.removeprefix("train-")) for key in DataSet.open(tmp_path / "out").split("train").keys]
        np.testing.assert_allclose(card.x.mean[:2], numbers[rows].mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(card.x.std[:2], numbers[rows].std(axis=0), rtol=1e-12)
        assert (card.x.mean[2], card.x.std[2]) == (np.float32(0.1), 1)  # constant
        assert card.x.range == (min(numbers.min(), np.float32(0.1)), numbers.max())
        assert card.x.features == ("u", "v", "c")

    def test_a_val_split_of_the_source_stays(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(31, 3))
        np.savez(tmp_path / "a.npz", x_train=x, x_val=x[:7], x_test=x[:5])
        card = packed(tmp_path / "a.npz", tmp_path / "out")
        assert {name: split.rows for name, split in card.splits.items()} == {"train": 31, "val": 7, "test": 5}
        assert card.y is None
        assert card.labels_sha256 is None
        assert not (tmp_path / "out" / "labels.parquet").exists()

    def test_the_card_is_of_the_source_and_knows_no_path(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "out")
        assert str(tmp_path) not in (tmp_path / "out" / "card.json").read_text()
        assert Card.load(tmp_path / "out").source == "table:a.csv"

    def test_progress_counts_every_sample(self, tmp_path):
        table(tmp_path / "a.csv")
        told = []
        packed(tmp_path / "a.csv", tmp_path / "out", progress=told.append)
        assert sum(told) == ROWS


class TestAgain:
    def sources(self, tmp_path):
        table(tmp_path / "a.csv")
        np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(ROWS, 5)), y=np.arange(ROWS) % 3)
        for name in ("cat/1", "cat/2", "dog/1"):
            path = tmp_path / "photos" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(path)
        return [tmp_path / "a.csv", tmp_path / "a.npz", tmp_path / "photos", "digits"]

    def test_the_same_source_gives_the_same_bytes(self, tmp_path, monkeypatch):
        for index, source in enumerate(self.sources(tmp_path)):
            packed(source, tmp_path / f"one{index}")
            monkeypatch.setattr(os, "cpu_count", lambda: 7)
            packed(source, tmp_path / "elsewhere" / f"two{index}")
            assert content(tmp_path / f"one{index}") == content(tmp_path / "elsewhere" / f"two{index}")

    def test_into_the_same_folder_changes_nothing_and_keeps_new_labels(self, tmp_path):
        table(tmp_path / "a.csv")
        card = packed(tmp_path / "a.csv", tmp_path / "out")
        (tmp_path / "out" / "labels.parquet").write_bytes(b"labels that somebody added")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        assert packed(tmp_path / "a.csv", tmp_path / "out") == card
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before

    def test_another_data_set_is_replaced_only_when_asked(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "out")
        before = content(tmp_path / "out")
        table(tmp_path / "a.csv", rows=31)
        with pytest.raises(DataError, match="holds another data set"):
            packed(tmp_path / "a.csv", tmp_path / "out")
        assert content(tmp_path / "out") == before
        packed(tmp_path / "a.csv", tmp_path / "out", overwrite=True)
        assert Card.load(tmp_path / "out").splits["train"].rows == 28  # 31 - floor(31 / 10)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out"]

    def test_a_damaged_copy_is_not_taken_for_the_same(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "out")
        before = content(tmp_path / "out")
        shard = tmp_path / "out" / "train-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(DataError, match="a damaged copy of this one"):
            packed(tmp_path / "a.csv", tmp_path / "out")
        packed(tmp_path / "a.csv", tmp_path / "out", overwrite=True)
        assert content(tmp_path / "out") == before

    def test_through_a_link_to_an_empty_folder(self, tmp_path):
        table(tmp_path / "a.csv")
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "disk")
        packed(tmp_path / "a.csv", tmp_path / "out")
        assert (tmp_path / "disk" / "card.json").exists()
        assert (tmp_path / "out").is_symlink()


class TestBadInput:
    def fails(self, source, out, message, error=DataError, **options):
        """The error is of one kind, and the folder that holds `out` is as it was before."""
        before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
        with pytest.raises(error, match=message):
            packed(source, out, **options)
        assert (sorted(out.parent.rglob("*")) if out.parent.exists() else None) == before

    def test_nothing_there(self, tmp_path):
        self.fails("digit", tmp_path / "out", r"(?s)digit is neither a file.*sklearn: digits")

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        self.fails(tmp_path / "in", tmp_path / "out", r"(?s)in is an empty folder.*images: a folder of png")

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "notes.txt").write_text("nothing")
        self.fails(tmp_path / "in", tmp_path / "out", r"(?s)is nothing that can be packed.*idx: .*table: ")

    def test_a_folder_of_two_kinds(self, tmp_path):
        (tmp_path / "in").mkdir()
        table(tmp_path / "in" / "train.csv")
        Image.new("L", (3, 5)).save(tmp_path / "in" / "a.png")
        self.fails(tmp_path / "in", tmp_path / "out", "several kinds: images .* and table .*Move the files")

    def test_a_data_set(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "in")
        self.fails(tmp_path / "in", tmp_path / "out", "is a data set already")

    def test_a_bad_cell_near_the_end(self, tmp_path):
        table(tmp_path / "a.csv", rows=20_000)
        with (tmp_path / "a.csv").open("a") as file:
            file.write("tall,1,1,a\n")
        self.fails(tmp_path / "a.csv", tmp_path / "out", "row 20001, column 'u' holds the text 'tall'")

    def test_a_key_of_two_samples(self, tmp_path):
        (tmp_path / "a.csv").write_text("key,u\na,1\nb,2\na,3\n")
        self.fails(tmp_path / "a.csv", tmp_path / "out", "the key 'a' stands for two samples")

    def test_out_that_is_taken(self, tmp_path):
        table(tmp_path / "a.csv")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        self.fails(tmp_path / "a.csv", tmp_path / "file", "file is a file")
        self.fails(tmp_path / "a.csv", tmp_path / "full", "holds other files")
        self.fails(tmp_path / "a.csv", tmp_path / "full", "holds other files", overwrite=True)
        self.fails(tmp_path / "a.csv", tmp_path / "file" / "out", "cannot (create|pack)", SslAeError)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_out_that_is_not_writable(self, tmp_path):
        table(tmp_path / "a.csv")
        (tmp_path / "locked").mkdir(mode=0o500)
        self.fails(tmp_path / "a.csv", tmp_path / "locked" / "out", "not writable", SslAeError)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where even root cannot write")
    def test_out_that_nobody_can_write(self, tmp_path):
        table(tmp_path / "a.csv")
        self.fails(tmp_path / "a.csv", Path("/proc/nowhere/out"), "cannot create the folder /proc/nowhere", SslAeError)

    def test_a_disk_that_fills_up(self, tmp_path, monkeypatch):
        def full(self, keys, x):
            raise OSError(28, "No space left on device")

        table(tmp_path / "a.csv")
        monkeypatch.setattr("ssl_ae.data.pack.ShardWriter.write", full)
        self.fails(tmp_path / "a.csv", tmp_path / "out", "cannot write .*out: No space left on device", DiskError)

    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            (None, "train changed between two readings|train ended after"),
            (lambda self, rows: np.full((rows, 2), 2, dtype=np.float32), "sample k0 holds 2.0, .* from 0 to 1"),
            (lambda self, rows: np.full((rows, 2), np.nan, dtype=np.float32), "sample k0 holds nan"),
            (lambda self, rows: np.zeros((rows, 3), dtype=np.float32), r"float32 \(3,\), but the source promised"),
            (lambda self, rows: np.zeros((rows, 2)), "float64"),
        ],
    )
    def test_a_source_that_breaks_its_promise(self, tmp_path, samples, message):
        broken = type("Broken", (Growing,), {"samples": samples, "keys": lambda self, split: [f"k{r}" for r in range(21)]})
        with pytest.raises(DataError, match=message):
            pack("growing", tmp_path / "out", PackOptions(), [broken if samples else Growing])
        assert not list(tmp_path.iterdir())


class TestInspect:
    @pytest.fixture
    def folder(self, tmp_path):
        table(tmp_path / "a.csv")
        packed(tmp_path / "a.csv", tmp_path / "out")
        return tmp_path / "out"

    def test_a_whole_data_set(self, folder):
        found = inspect(DataSet.open(folder, verify="none"))
        assert found["damaged"] == []
        assert [shard["verdict"] for shard in found["shards"]] == ["ok", "ok"]
        assert found["labels"] == {"file": "labels.parquet", "verdict": "ok"}
        classes = [found["splits"][name]["classes"] for name in ("train", "val")]
        # row % 3 != 0, counted by the parity of the row
        expected = np.bincount([row % 2 for row in range(ROWS) if row % 3])
        assert [sum(split[name] for split in classes) for name in "ab"] == expected.tolist()
        assert found["splits"]["val"]["rows"] == 109
        assert found["splits"]["val"]["labeled"] == sum(classes[1].values())

    def test_the_label_table_has_each_split_in_its_own_order(self, folder):
        data = DataSet.open(folder)
        labels = {name: data.labels(name) for name in ("train", "val")}
        expected = [key for name, known in labels.items() for key in data.split(name).keys[known != UNLABELED]]
        assert data.label_table.keys.tolist() == expected

    @pytest.mark.parametrize(
        ("damage", "verdict"),
        [
            (lambda data: data[:-1000], "truncated"),
            (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "sha256"),
            (None, "No such file"),
        ],
    )
    def test_a_damaged_shard_is_named(self, folder, damage, verdict):
        shard = folder / "val-000000.tar"
        if damage is None:
            shard.unlink()
        else:
            shard.write_bytes(damage(shard.read_bytes()))
        found = inspect(DataSet.open(folder, verify="none"))
        assert found["damaged"] == ["val-000000.tar"]
        assert [shard["verdict"] == "ok" for shard in found["shards"]] == [True, False]
        assert verdict in found["shards"][1]["verdict"]
        assert found["splits"]["val"] == {"rows": 109, "labeled": None, "classes": None}
        assert found["splits"]["train"]["labeled"] is not None

    def test_labels_that_changed_are_no_damage_but_labels_that_broke_are(self, folder):
        data = DataSet.open(folder)
        keys = data.split("train").keys[:5]
        type(data.label_table)(keys, np.zeros(5, dtype=np.int64)).write(folder / "labels.parquet")
        found = inspect(DataSet.open(folder, verify="none"))
        assert (found["labels"]["verdict"], found["damaged"]) == (CHANGED, [])
        assert found["splits"]["train"]["classes"] == {"a": 5, "b": 0}
        (folder / "labels.parquet").write_bytes(b"broken")
        found = inspect(DataSet.open(folder, verify="none"))
        assert found["damaged"] == ["labels.parquet"]
        assert found["splits"]["train"]["classes"] is None


@pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not here")
def test_mnist(tmp_path):
    card = packed(MNIST, tmp_path / "one")
    assert {name: split.rows for name, split in card.splits.items()} == {"train": 54_000, "val": 6_000, "test": 10_000}
    packed(MNIST, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    found = inspect(DataSet.open(tmp_path / "one", verify="none"))
    # the class counts that MNIST's page states for its train and test images
    train = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    counts = {name: list(split["classes"].values()) for name, split in found["splits"].items()}
    assert counts["test"] == test
    np.testing.assert_array_equal(np.add(counts["train"], counts["val"]), train)
