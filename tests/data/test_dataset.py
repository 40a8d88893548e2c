"""Data sets as a whole: packed by us, or shards made elsewhere."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from ssl_ae.data.card import Card, Split, X, Y
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.holdout import holdout
from ssl_ae.data.labels import LabelTable
from ssl_ae.data.moments import Moments, described
from ssl_ae.data.shards import ShardWriter
from ssl_ae.errors import DataError

SHAPE = (3, 5)
X_SIGNAL = X(kind="signal", dtype="float32", shape=SHAPE, range=(-5, 5))
PETS = Y(task="classes", names=("cat", "dog"))


def values(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, *SHAPE)).astype(np.float32)


@pytest.fixture
def packed(tmp_path):
    """train: 41 rows in blocks of 7 and shards of two blocks; test: 11 rows in one block."""
    splits = {}
    for name, rows, seed in (("train", 41, 0), ("test", 11, 1)):
        with ShardWriter(tmp_path, name, block_rows=7, shard_bytes=5120) as writer:
            writer.write([f"{name}-{row}" for row in range(rows)], values(rows, seed))
        splits[name] = Split(rows=rows, shards=writer.close())
    Card(name="toy", x=X_SIGNAL, y=PETS, splits=splits).save(tmp_path)
    table = LabelTable(np.array(["train-3", "test-10", "train-40"], dtype=object), np.array([0, 1, 1]))
    table.write(tmp_path / "labels.parquet")
    return tmp_path


def test_rows_are_read_across_shards_in_the_order_asked(packed):
    train = DataSet.open(packed).split("train")
    assert (train.name, train.rows) == ("train", 41)
    assert len(list(packed.glob("train-*.tar"))) == 3
    assert train.block_starts.tolist() == [0, 7, 14, 21, 28, 35]
    assert train.keys.tolist() == [f"train-{row}" for row in range(41)]
    x = values(41)
    for rows in (np.arange(41), np.arange(11, 31), np.array([40, 0, 0, 22, 13, 14]), np.array([], dtype=np.int64)):
        read = train.read(rows)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, x[rows])
    with pytest.raises(IndexError):
        train.read(np.array([41]))


def test_labels_are_aligned_with_rows(packed):
    data = DataSet.open(packed)
    assert np.flatnonzero(data.labels("train") >= 0).tolist() == [3, 40]
    assert data.labels("train")[[3, 40]].tolist() == [0, 1]
    assert data.labels("test").tolist() == [-1] * 10 + [1]


def test_a_shard_is_opened_when_its_rows_are_read(packed):
    (packed / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: No such file"):
        DataSet.open(packed)
    train = DataSet.open(packed, verify="none").split("train")
    np.testing.assert_array_equal(train.read(np.arange(28)), values(41)[:28])
    with pytest.raises(DataError, match=r"train-000002\.tar: No such file"):
        train.read(np.array([28]))


def test_verify_names_the_damaged_shard(packed):
    DataSet.open(packed, verify="all")
    path = packed / "test-000000.tar"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)
    DataSet.open(packed, verify="none")  # opening alone reads no samples
    for verify in ("all", "new"):
        with pytest.raises(DataError, match=r"test-000000\.tar is damaged"):
            DataSet.open(packed, verify=verify)


def test_a_split_whose_shards_do_not_add_up_is_refused(packed):
    card = Card.load(packed)
    splits = {**card.splits, "test": card.splits["test"].model_copy(update={"rows": 12})}
    card.model_copy(update={"splits": splits}).save(packed)
    with pytest.raises(DataError, match="split 'test' has 12 rows, but its shards have 11"):
        DataSet.open(packed).split("test")


def test_a_split_that_is_not_there_names_those_that_are(packed):
    with pytest.raises(DataError, match="has no split 'val'; it has train and test"):
        DataSet.open(packed).split("val")


def test_users_labels_are_checked_against_every_split(packed, tmp_path):
    data = DataSet.open(packed)
    path = tmp_path / "mine.csv"
    path.write_text("key,label\ntrain-0,dog\ntest-0,cat\n")
    assert data.read_labels(path).labels.tolist() == [1, 0]
    path.write_text("key,label\ntrain-0,dog\ntrain-41,cat\n")
    with pytest.raises(DataError, match=r"mine\.csv: 1 of 2 keys are not in the data set, for example 'train-41'"):
        data.read_labels(path)


def test_a_set_without_labels_takes_their_meaning_from_the_user(packed):
    Card.load(packed).model_copy(update={"y": None}).save(packed)
    data = DataSet.open(packed)
    assert data.labels("test").tolist() == [-1] * 11
    with pytest.raises(DataError, match=r"has no labels\. Name a file"):
        _ = data.label_table
    path = packed / "mine.csv"
    path.write_text("key,label\ntrain-0,owl\ntrain-1,elk\n")
    assert data.read_labels(path).y == Y(task="classes", names=("elk", "owl"))


@pytest.mark.parametrize(
    ("remove", "complaint"),
    [
        ("card.json", r"has labels\.parquet but lost its card\.json"),
        ("labels.parquet", r"labels\.parquet does not exist"),
    ],
)
def test_a_folder_that_lost_a_file_is_explained(packed, remove, complaint):
    (packed / remove).unlink()
    with pytest.raises(DataError, match=complaint):
        DataSet.open(packed).labels("train")


def test_folders_that_hold_nothing_are_explained(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        DataSet.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"neither a card\.json nor \.tar shards"):
        DataSet.open(tmp_path)


# --- shards made elsewhere


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def foreign(folder, shards, x, label=None):
    """Shards of one .npy a sample; shards: {file: keys}; x: one row a key, in order."""
    rows = iter(x)
    for file, keys in shards.items():
        members = {}
        for key in keys:
            members[f"{key}.npy"] = npy(next(rows))
            if label is not None:
                members[f"{key}.cls"] = label(key)
        write_tar(folder / file, members)


def test_shards_made_elsewhere_train_without_packing(tmp_path):
    x = values(34)
    names = [f"s{row:02d}" for row in range(34)]
    shards = {"a.tar": names[:13], "b.tar": names[13:31], "test-0.tar": names[31:]}
    foreign(tmp_path, shards, x, lambda key: b"hen" if key == "s07" else b"owl")
    data = DataSet.open(tmp_path)
    assert {name: split.rows for name, split in data.card.splits.items()} == {"train": 28, "val": 3, "test": 3}
    assert data.card.x == X(kind="signal", dtype="float32", shape=SHAPE, range=(float(x.min()), float(x.max())))
    assert data.card.y == Y(task="classes", names=("hen", "owl"))
    val = data.split("val")
    # the ruling, written again: train keys in the order of their sha256, the first floor(31 / 10)
    assert set(val.keys) == set(sorted(names[:31], key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:3])
    for name in ("train", "val", "test"):
        split = data.split(name)
        rows = np.random.default_rng(0).permutation(split.rows)
        np.testing.assert_array_equal(split.read(rows), x[[int(key[1:]) for key in split.keys[rows]]])
        assert data.labels(name).tolist() == [0 if key == "s07" else 1 for key in split.keys]
        assert split.block_starts.tolist() == [0]
    assert DataSet.open(tmp_path).card.fingerprint == data.card.fingerprint


def test_keys_that_several_shards_use_get_the_shards_name(tmp_path):
    foreign(tmp_path, {"train-0.tar": ["0", "1"], "val-0.tar": ["0"]}, values(3))
    data = DataSet.open(tmp_path)
    assert data.split("train").keys.tolist() == ["train-0/0", "train-0/1"]
    assert data.split("val").keys.tolist() == ["val-0/0"]
    assert data.card.y is None


def test_vectors_made_elsewhere_get_mean_and_std_of_train(tmp_path):
    x = np.random.default_rng(0).normal(3, 2, size=(20, 7)).astype(np.float32)
    x[:, 4] = 1.5
    foreign(tmp_path, {"train.tar": range(17), "val.tar": range(17, 20)}, x)
    found = DataSet.open(tmp_path).card.x
    assert found.range == (float(x.min()), float(x.max()))
    np.testing.assert_allclose(found.mean, x[:17].mean(0, dtype=np.float64), rtol=1e-12)
    std = x[:17].std(0, dtype=np.float64)
    np.testing.assert_allclose(found.std, np.where(std == 0, 1, std), rtol=1e-12)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_sample(tmp_path, number):
    x = values(6)
    x[4, 2, 1] = number
    foreign(tmp_path, {"a.tar": ["u", "v", "w"], "b.tar": ["x", "y", "z"]}, x)
    with pytest.raises(DataError, match=r"b\.tar: sample y holds NaN or infinity"):
        DataSet.open(tmp_path)


def test_shards_that_differ_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.npy": npy(np.ones((3, 5)))})
    write_tar(tmp_path / "b.tar", {"1.npy": npy(np.ones((5, 3)))})
    with pytest.raises(DataError, match=r"b\.tar: sample 1 is float32 \(5, 3\), but the data set holds float32 \(3, 5\)"):
        DataSet.open(tmp_path)


def test_lists_of_numbers_are_targets(tmp_path):
    members = {}
    for row, label in enumerate(("[0.5, 2]", "null", "[1, 3]")):
        members |= {f"{row}.npy": npy(np.ones(3)), f"{row}.json": f'{{"label": {label}}}'.encode()}
    write_tar(tmp_path / "test.tar", members)
    data = DataSet.open(tmp_path)
    assert data.card.y == Y(task="regression", names=("label_0", "label_1"))
    np.testing.assert_array_equal(data.labels("test"), [[0.5, 2], [np.nan, np.nan], [1, 3]])
    write_tar(tmp_path / "test.tar", {**members, "3.npy": npy(np.ones(3)), "3.cls": b"1"})
    with pytest.raises(DataError, match="labels differ in length"):
        DataSet.open(tmp_path)


# --- what the folder's figures rest on


@pytest.mark.parametrize("rows", [0, 9, 10, 101])
def test_one_in_ten_is_held_out_whatever_the_order(rows):
    keys = [f"k{row}" for row in range(rows)]
    held = holdout(keys)
    assert held.sum() == rows // 10
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_array_equal(holdout([keys[row] for row in shuffled]), held[shuffled])


def test_moments_of_blocks_are_moments_of_all():
    x = np.random.default_rng(0).normal(1e4, 1e-2, size=(1009, 3))  # a large mean cancels in a sum of squares
    moments = Moments()
    for block in np.split(x, [1, 500, 500, 777]):
        moments.add(block)
    mean, std = moments.feature_scale()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(std, x.std(0), rtol=1e-9)
    assert (moments.low, moments.high, moments.rows) == (x.min(), x.max(), 1009)


def test_images_of_bytes_keep_the_range_of_their_format():
    image = X(kind="image", dtype="uint8", shape=(1, 2, 2), range=(0, 255))
    moments = Moments()
    moments.add(np.full((2, 1, 2, 2), 7, np.uint8))
    assert described(image, moments, moments) == image
