"""Shards: webdataset is the oracle for what is written, the samples themselves for what is read."""

import contextlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_ae import files
from ssl_ae.data import shards
from ssl_ae.data.card import Shard, X
from ssl_ae.data.shards import ShardReader, ShardWriter, verify_sha256
from ssl_ae.errors import DataError

SIGNAL = X(kind="signal", dtype="float32", shape=(3, 5), range=(-9, 9))
ROWS = 23


def samples(rows=ROWS, shape=(3, 5), dtype="float32"):
    keys = [f"train-{row:08d}" for row in range(rows)]
    return keys, (np.random.default_rng(0).normal(size=(rows, *shape)) * 50).astype(dtype)


def write(folder, rows=ROWS, **options):
    keys, x = samples(rows)
    with ShardWriter(folder, "train", **options) as writer:
        for start in range(0, rows, 4):  # never the size of a block
            writer.write(keys[start : start + 4], x[start : start + 4])
    return writer.close()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(array, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# --- blocks


def test_webdataset_reads_the_same_samples(tmp_path):
    import webdataset

    [shard] = write(tmp_path, block_rows=7)
    # FileOpener and tarfile_to_samples, without .decode(): the bytes of each member
    blocks = list(webdataset.WebDataset(str(tmp_path / shard.file), shardshuffle=False))
    keys, x = samples()
    assert [block["__key__"] for block in blocks] == ["000000", "000001", "000002", "000003"]
    assert [key for block in blocks for key in json.loads(block["key.json"])] == keys
    np.testing.assert_array_equal(np.concatenate([np.load(io.BytesIO(block["x.npy"])) for block in blocks]), x)


def test_rows_come_back_in_the_order_asked(tmp_path):
    [shard] = write(tmp_path, block_rows=7)
    reader = ShardReader(tmp_path / shard.file, SIGNAL, shard)
    keys, x = samples()
    assert reader.rows == shard.rows == ROWS
    assert reader.keys() == keys
    assert reader.block_starts.tolist() == [0, 7, 14, 21]
    for rows in (np.arange(ROWS), np.arange(5, 17), np.array([22, 0, 13, 13, 7, 6]), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(reader.read(rows), x[rows])
    read = reader.read(np.arange(3))
    read[:] = 0  # the caller's own memory, not the map's
    np.testing.assert_array_equal(reader.read(np.arange(3)), x[:3])


@pytest.mark.parametrize("rows", [[-1], [ROWS], [0, ROWS]])
def test_rows_outside_the_shard_are_refused(tmp_path, rows):
    [shard] = write(tmp_path)
    with pytest.raises(IndexError):
        ShardReader(tmp_path / shard.file).read(np.array(rows))


def test_shards_are_cut_by_bytes_and_numbered(tmp_path):
    found = write(tmp_path, block_rows=5, shard_bytes=4096)  # a block: 428 bytes of x, 90 of keys, with headers 2,048
    assert [shard.file for shard in found] == [f"train-{index:06d}.tar" for index in range(3)]
    assert [shard.rows for shard in found] == [10, 10, 3]
    for shard in found:
        path = tmp_path / shard.file
        assert (path.stat().st_size, files.sha256_of(path)) == (shard.bytes, shard.sha256)
        verify_sha256(path, shard)


def test_large_samples_get_shorter_blocks(tmp_path):
    x = np.zeros((5, 3, 1024, 1024), dtype=np.uint8)  # 3 MiB each: five fit in the 16 MiB of a block
    with ShardWriter(tmp_path, "train") as writer:
        writer.write([str(row) for row in range(5)], x)
        writer.write(["5"], x[:1])
    assert ShardReader(tmp_path / "train-000000.tar").block_starts.tolist() == [0, 5]


def test_equal_samples_give_equal_bytes_however_they_arrive(tmp_path):
    keys, x = samples()
    write(tmp_path / "a", block_rows=7)
    with ShardWriter(tmp_path / "b", "train", block_rows=7) as writer:
        writer.write(keys, x)
    first, second = (tmp_path / name / "train-000000.tar" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar} == {(0, 0, 0, "", "", 0o644)}


def test_the_writer_keeps_no_view_of_the_callers_buffer(tmp_path):
    buffer = np.ones((2, 3), dtype=np.float32)
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(["a", "b"], buffer)
        buffer[:] = 0
    np.testing.assert_array_equal(ShardReader(tmp_path / "train-000000.tar").read(np.arange(2)), np.ones((2, 3)))


def test_an_exception_leaves_no_unfinished_shard(tmp_path):
    keys, x = samples()

    def interrupted():
        with ShardWriter(tmp_path, "train", block_rows=5) as writer:
            writer.write(keys, x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_nothing_written_is_no_shard(tmp_path):
    with ShardWriter(tmp_path, "val") as writer:
        writer.write([], np.empty((0, 3), dtype=np.float32))
    assert writer.close() == ()


@pytest.mark.parametrize("second", [np.zeros((1, 4), np.float32), np.zeros((1, 3), np.uint8), np.zeros((1, 3))])
def test_the_writer_refuses_samples_that_differ(tmp_path, second):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(["a"], np.zeros((1, 3), np.float32))
        with pytest.raises(ValueError, match="all of one dtype and shape"):
            writer.write(["b"], second)


# --- damage


def test_a_truncated_shard_is_named_with_both_sizes(tmp_path):
    [shard] = write(tmp_path)
    path = tmp_path / shard.file
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=rf"train-000000.tar has 3,000 bytes, but the card says {shard.bytes:,}"):
        ShardReader(path, SIGNAL, shard)


def test_rows_that_do_not_match_the_card_are_named(tmp_path):
    [shard] = write(tmp_path)
    with pytest.raises(DataError, match="holds 23 samples, but the card says 24"):
        ShardReader(tmp_path / shard.file, SIGNAL, shard.model_copy(update={"rows": 24}))


def test_another_shape_or_dtype_than_the_cards_is_refused(tmp_path):
    [shard] = write(tmp_path)
    for update in ({"shape": (5, 3)}, {"dtype": "uint8"}):
        with pytest.raises(DataError, match=r"is float32 \(3, 5\), but the data set holds"):
            ShardReader(tmp_path / shard.file, SIGNAL.model_copy(update=update))


def test_an_absent_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar: No such file"):
        ShardReader(tmp_path / "gone.tar")


def test_a_flipped_bit_fails_the_checksum(tmp_path):
    [shard] = write(tmp_path)
    path = tmp_path / shard.file
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="sha256 is not the card's"):
        verify_sha256(path, shard)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write(folder, block_rows=7)
    tall = {f"{row}.{kind}": content for row in range(5) for kind, content in (("npy", npy(np.ones(3))), ("cls", b"1"))}
    return (folder / "train-000000.tar").read_bytes(), write_tar(folder / "x.tar", tall).read_bytes()


def read_everything(path):
    reader = ShardReader(path)
    return reader.keys(), reader.labels(), reader.read(np.arange(reader.rows))


@given(which=st.integers(0, 1), share=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_shard_cut_anywhere_is_an_error_or_whole(tmp_path_factory, sound, which, share):
    path = tmp_path_factory.mktemp("cut") / "cut.tar"
    path.write_bytes(sound[which])
    keys, labels, x = read_everything(path)
    path.write_bytes(sound[which][: int(share * len(sound[which]))])
    with contextlib.suppress(DataError):
        again = read_everything(path)
        assert again[:2] == (keys, labels)
        np.testing.assert_array_equal(again[2], x)


@given(which=st.integers(0, 1), at=st.integers(0, 10_000_000), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_never_a_crash(tmp_path_factory, sound, which, at, bit):
    path = tmp_path_factory.mktemp("flip") / "flip.tar"
    content = bytearray(sound[which])
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        keys, _, x = read_everything(path)
        assert len(keys) == len(x)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    [shard] = write(tmp_path, block_rows=7)
    path = tmp_path / shard.file
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third + 3] ^= 1  # in the name: only the header's checksum tells
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"no sound header and no end of the archive at byte {third:,}"):
        ShardReader(path)


def test_keys_that_do_not_fit_their_block_are_refused(tmp_path):
    for keys in (b'["a"]', b"[1, 2]", b"{"):
        path = write_tar(tmp_path / "a.tar", {"0.x.npy": npy(np.ones((2, 3), np.float32)), "0.key.json": keys})
        with pytest.raises(DataError, match=r"0\.key\.json is"):
            ShardReader(path).keys()


@pytest.mark.parametrize(
    "array", [np.ones((2, 3)), np.ones((2, 3), ">f4"), np.asfortranarray(np.ones((2, 3), np.float32)), np.ones(3, np.uint8)]
)
def test_blocks_that_cannot_be_mapped_as_they_lie_are_refused(tmp_path, array):
    path = write_tar(tmp_path / "a.tar", {"0.x.npy": npy(array), "0.key.json": b"[]"})
    with pytest.raises(DataError, match="expected rows of uint8 or float32 in C order"):
        ShardReader(path)


def test_a_shard_that_takes_the_name_of_another_is_read_afresh(tmp_path):
    [shard] = write(tmp_path)
    path = tmp_path / shard.file
    before = ShardReader(path).read(np.arange(2))
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(["a", "b"], -before)
    np.testing.assert_array_equal(ShardReader(path).read(np.arange(2)), -before)


def test_maps_are_let_go_and_taken_up_again(tmp_path, monkeypatch):
    [shard] = write(tmp_path)
    reader, (_, x) = ShardReader(tmp_path / shard.file), samples()
    monkeypatch.setattr(shards, "MAPPED_BYTES", 100)
    for _ in range(3):
        np.testing.assert_array_equal(reader.read(np.arange(ROWS)), x)  # 1,380 bytes: more than may stay mapped
        assert not shards._MAPS._open


def test_a_shard_replaced_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    [shard] = write(tmp_path)
    path, reader = tmp_path / shard.file, ShardReader(tmp_path / shard.file)
    monkeypatch.setattr(shards, "MAPPED_BYTES", 0)
    reader.read(np.arange(2))
    path.write_bytes(path.read_bytes()[:1024])  # a map of it would end in a crash
    with pytest.raises(DataError, match="was replaced while it was read"):
        reader.read(np.arange(2))


# --- one file a sample


def test_images_of_other_makers(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    members = {
        "cats/a.PNG": png(colour[0]),
        "cats/a.cls": b" 3\n",
        "cats/b.v2.png": png(colour[1]),  # WebDataset's key ends at the first dot
        "cats/b.json": b'{"label": "tabby", "width": 7}',
        "dogs/c.png": png(grey),  # grey among colours
        "dogs/c.txt": b"a dog",
        "._dogs": b"of a Mac",
    }
    reader = ShardReader(write_tar(tmp_path / "train.tar", members))
    assert reader.x == X(kind="image", dtype="uint8", shape=(3, 5, 7), range=(0, 255))
    assert reader.keys() == ["cats/a", "cats/b", "dogs/c"]
    assert reader.labels() == [3, "tabby", None]
    expected = np.stack([*colour.transpose(0, 3, 1, 2), np.broadcast_to(grey, (3, 5, 7))])
    np.testing.assert_array_equal(reader.read(np.array([2, 0, 1])), expected[[2, 0, 1]])


def test_a_set_in_colour_may_begin_with_a_grey_image(tmp_path):
    members = {"a.png": png(np.ones((5, 7), np.uint8)), "b.png": png(np.ones((5, 7, 3), np.uint8))}
    reader = ShardReader(write_tar(tmp_path / "a.tar", members))
    np.testing.assert_array_equal(reader.read(np.arange(2)), np.ones((2, 3, 5, 7)))


def test_grey_images_keep_one_channel(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    reader = ShardReader(write_tar(tmp_path / "a.tar", {"0.jpg": png(grey, "JPEG", quality=100), "1.png": png(grey)}))
    assert reader.x.shape == (1, 5, 7)
    assert np.abs(reader.read(np.array([0]))[0, 0].astype(int) - grey).max() <= 3  # lossy
    np.testing.assert_array_equal(reader.read(np.array([1]))[0, 0], grey)


@pytest.mark.parametrize(
    ("array", "x"),
    [
        (np.ones(3), X(kind="vector", dtype="float32", shape=(3,), range=(-np.inf, np.inf))),
        (np.ones((3, 5), np.float16), X(kind="signal", dtype="float32", shape=(3, 5), range=(-np.inf, np.inf))),
        (np.ones((5, 7), np.uint8), X(kind="image", dtype="uint8", shape=(1, 5, 7), range=(0, 255))),
        (np.ones((2, 5, 7), np.uint8), X(kind="image", dtype="uint8", shape=(2, 5, 7), range=(0, 255))),
    ],
)
def test_arrays_say_what_they_are(tmp_path, array, x):
    reader = ShardReader(write_tar(tmp_path / "a.tar", {"k.npy": npy(array)}))
    assert reader.x == x
    np.testing.assert_array_equal(reader.read(np.array([0])), np.ones((1, *x.shape)))


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"a.txt": b"x"}, r"sample a has \.txt: expected exactly one of"),
        ({"a.png": png(np.zeros((2, 2), np.uint8)), "a.npy": npy(np.ones(3))}, r"sample a has \.png and \.npy"),
        ({"a.png": b"no image"}, "sample a: the image is damaged"),
        ({"a.png": png(np.zeros((2, 2), np.uint16))}, "more than 8 bits a channel"),
        ({"a.npy": npy(np.ones(3, np.int64))}, "holds int64: expected uint8 or floats"),
        ({"a.npy": npy(np.ones((8, 8, 8)))}, r"shape \(8, 8, 8\): expected"),
        ({"a.npy": pickle.dumps([1])}, r"sample a: the \.npy member is damaged"),
        ({}, "holds no samples"),
    ],
)
def test_what_cannot_be_a_sample_is_explained(tmp_path, members, complaint):
    with pytest.raises(DataError, match=complaint):
        ShardReader(write_tar(tmp_path / "a.tar", members))


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    array = np.empty(1, dtype=object)
    array[0] = Bomb()
    for members in ({"a.npy": npy(array)}, {"0.x.npy": npy(array), "0.key.json": b'["a"]'}):
        with pytest.raises(DataError):
            ShardReader(write_tar(tmp_path / "a.tar", members))


def test_an_image_of_another_size_is_found_when_it_is_read(tmp_path):
    members = {"a.png": png(np.zeros((5, 7), np.uint8)), "b.png": png(np.zeros((7, 5), np.uint8))}
    reader = ShardReader(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"sample b is uint8 \(1, 7, 5\), but the data set holds uint8 \(1, 5, 7\)"):
        reader.read(np.arange(2))


def test_members_of_a_sample_may_lie_apart(tmp_path):
    x = npy(np.ones(3))
    members = {"a.cls": b"1", "b.cls": b"2", "b.npy": x, "b.json": b'{"label": 5}', "a.json": b'{"label": 6}', "a.npy": x}
    reader = ShardReader(write_tar(tmp_path / "a.tar", members))
    assert (reader.keys(), reader.labels()) == (["a", "b"], [1, 2])  # the .cls speaks where there are both
    members = {"a.json": b'{"label": 7}', "b.npy": x, "a.npy": x, "a.cls": b"8"}
    assert ShardReader(write_tar(tmp_path / "b.tar", members)).labels() == [8, None]


def test_a_member_that_comes_twice_is_named(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for content in (npy(np.ones(3)), npy(np.zeros(3))):
            info = tarfile.TarInfo("a.npy")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"has a\.npy twice"):
        ShardReader(path)


def test_a_damaged_label_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.npy": npy(np.ones(3)), "a.json": b'{"label": {"x": 1}}'})
    with pytest.raises(DataError, match=r"sample a: label = \{'x': 1\}"):
        ShardReader(path).labels()


def test_long_names_and_other_members_are_read_as_tar_means_them(tmp_path):
    long = "deep/" * 60 + "sample"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo(long + ".npy")
        info.size, info.mtime = len(npy(np.ones(3))), 1.5  # a fraction: webdataset's writer makes such pax headers
        tar.addfile(info, io.BytesIO(npy(np.ones(3))))
    assert ShardReader(path).keys() == [long]


def test_the_cards_entry_is_enough_to_notice_a_replaced_shard(tmp_path):
    [shard] = write(tmp_path)
    other = Shard(file=shard.file, rows=shard.rows, bytes=shard.bytes + 512, sha256=shard.sha256)
    with pytest.raises(DataError, match="truncated or replaced"):
        ShardReader(tmp_path / shard.file, SIGNAL, other)
