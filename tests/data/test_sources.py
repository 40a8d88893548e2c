import gzip
import hashlib
import io
import json
import struct
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_kit import everything, opened, random_bytes

from ssl_ae.data.sources import TO_BE_MEASURED
from ssl_ae.data.sources.idx import Idx
from ssl_ae.data.sources.npz import Npz
from ssl_ae.data.sources.sklearn import Named
from ssl_ae.data.sources.webdataset import WebDataset
from ssl_ae.errors import DataError

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "mnist"


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


class TestIdx:
    images = random_bytes(1031, 5, 7)  # one block of 1,024 and a part
    labels = np.arange(1031, dtype=np.uint8) % 3

    def write(self, folder, joint="-", squeeze=False, **content):
        content = {"train-images": self.images, "train-labels": self.labels, **content}
        for name, array in content.items():
            data = array if isinstance(array, bytes) else idx_bytes(array)
            ending = "3-ubyte" if "images" in name else "1-ubyte"
            path = folder / f"{name}{joint}idx{ending}{'.gz' if squeeze else ''}"
            path.write_bytes(gzip.compress(data) if squeeze else data)
        return folder

    @pytest.mark.parametrize("joint", ["-", "."])
    @pytest.mark.parametrize("squeeze", [False, True])
    def test_reads_what_was_written(self, tmp_path, joint, squeeze):
        test = {"t10k-images": self.images[:11], "t10k-labels": self.labels[:11]}
        source = opened(Idx, self.write(tmp_path, joint, squeeze, **test))
        about = source.describe()
        assert (about.x.shape, about.x.dtype, about.x.range) == ((1, 5, 7), "uint8", (0, 255))
        assert (about.task, about.names, about.splits) == ("classes", ("0", "1", "2"), ("train", "test"))
        keys, x, labels = everything(source)
        assert (keys[0], keys[-1]) == ("train-00000000", "train-00001030")
        np.testing.assert_array_equal(x[:, 0], self.images)
        np.testing.assert_array_equal(labels, self.labels)
        assert everything(source, "test")[0][3] == "test-00000003"

    def test_a_split_without_a_label_file_is_unlabelled(self, tmp_path):
        (self.write(tmp_path) / "train-labels-idx1-ubyte").unlink()
        source = opened(Idx, tmp_path)
        assert (source.describe().task, everything(source)[2]) == (None, None)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"train-images": idx_bytes(images)[:-5]}, "truncated: 5 bytes are missing"),
            ({"train-images": idx_bytes(images) + b"x"}, "longer than its header says"),
            ({"train-images": b"\x00\x00\x0d\x03" + idx_bytes(images)[4:]}, "begins with 00 00 0d 03"),
            ({"train-labels": labels[:-1]}, "holds 1030 labels, but train-images-idx3-ubyte 1031 images"),
            ({"t10k-images": images[:, :, :6]}, "5x6, but train 5x7"),
            ({"train-images": images[:0]}, "is empty"),
        ],
    )
    def test_damage(self, tmp_path, content, message):
        with pytest.raises(DataError, match=message):
            everything(opened(Idx, self.write(tmp_path, **content)))

    def test_a_damaged_gz(self, tmp_path):
        path = self.write(tmp_path, squeeze=True) / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-900])
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is damaged"):
            everything(opened(Idx, tmp_path))

    def test_test_images_alone_are_no_data_set(self, tmp_path):
        (self.write(tmp_path, **{"t10k-images": self.images}) / "train-images-idx3-ubyte").unlink()
        with pytest.raises(DataError, match="no train-images-idx3-ubyte"):
            opened(Idx, tmp_path)

    @pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not here")
    def test_mnist(self):
        source = opened(Idx, MNIST)
        _, x, labels = everything(source, "test")
        assert x.shape == (10_000, 1, 28, 28)
        assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]  # the first test digits, as every tutorial has them
        assert len(source.keys("train")) == 60_000
        _, x, _ = everything(source)
        assert x.mean() / 255 == pytest.approx(0.1307, abs=1e-4)  # the mean everybody normalises MNIST by


class TestNpz:
    def write(self, folder, **arrays):
        np.savez(folder / "some.data.npz", **arrays)
        return folder / "some.data.npz"

    @pytest.mark.parametrize(
        ("stored", "shape", "to_stored"),
        [
            ((11, 5, 7), (1, 5, 7), lambda x: x[:, 0]),
            ((11, 5, 7, 3), (3, 5, 7), lambda x: x.transpose(0, 2, 3, 1)),
            ((11, 3, 5, 7), (3, 5, 7), lambda x: x),
            ((11, 1, 5, 3), (3, 1, 5), lambda x: x.transpose(0, 2, 3, 1)),  # both could be: channels are last
        ],
    )
    def test_images_become_channels_first(self, tmp_path, stored, shape, to_stored):
        array = random_bytes(*stored)
        source = opened(Npz, self.write(tmp_path, x=array))
        about = source.describe()
        assert (about.name, about.x.kind, about.x.dtype, about.x.shape) == ("some", "image", "uint8", shape)
        np.testing.assert_array_equal(to_stored(everything(source)[1]), array)

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["<f8", ">f4", "i4", "?"])
    def test_vectors_of_any_number_become_float32(self, tmp_path, order, dtype):
        array = np.asarray(np.random.default_rng(0).normal(size=(1031, 3)) * 9, dtype=dtype, order=order)
        source = opened(Npz, self.write(tmp_path, X=array))
        assert (source.describe().x.kind, source.describe().x.range) == ("vector", TO_BE_MEASURED)
        keys, x, _ = everything(source)
        assert keys[-1] == "train-00001030"
        np.testing.assert_array_equal(x, array.astype(np.float32))

    def test_splits_and_labels(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(13, 5))
        place = self.write(
            tmp_path, x_train=x, y_train=np.array([3, 9, -1] * 4 + [3])[:, None], x_test=x[:2], y_test=np.array([9, 5])
        )
        source = opened(Npz, place)
        assert (source.describe().splits, source.describe().names) == (("train", "test"), ("3", "5", "9"))
        assert everything(source)[2].tolist() == [0, 2, -1] * 4 + [0]
        assert everything(source, "test")[2].tolist() == [2, 1]

    def test_medmnist_names_and_class_names(self, tmp_path):
        x = random_bytes(3, 5, 7)
        place = self.write(tmp_path, train_images=x, train_labels=np.array(["b", "", "a"]), val_images=x)
        source = opened(Npz, place)
        assert (source.describe().splits, source.describe().names) == (("train", "val"), ("a", "b"))
        assert everything(source)[2].tolist() == [1, -1, 0]
        assert everything(source, "val")[2].tolist() == [-1, -1, -1]

    def test_nothing_is_unpickled(self, tmp_path):
        place = self.write(tmp_path, x=np.zeros((3, 2)), y=np.array([{}, [], 1], dtype=object))
        with pytest.raises(DataError, match="y holds Python objects, which are never unpickled"):
            opened(Npz, place)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"data": np.zeros((3, 2))}, "holds the arrays data; x_train or x is needed"),
            ({"x": np.zeros(3)}, r"shape \(3,\)"),
            ({"x": np.zeros((3, 5, 7, 11))}, "1 or 3 channels"),
            ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "4 labels for 3 samples"),
            ({"x": np.zeros((3, 2), complex)}, "not real numbers"),
            ({"x": np.zeros((0, 2))}, "no samples"),
            ({"x": np.array([[1.0, 2], [3, np.nan]])}, r"x\[1\] holds NaN"),
            ({"x": np.array([[1.0, 1e39]])}, r"x\[0\] holds NaN, infinity or a number beyond float32"),
            ({"x_train": np.zeros((3, 2)), "x_test": np.zeros((3, 4))}, r"x_test are float32 \(4,\)"),
        ],
    )
    def test_arrays_that_are_no_data_set(self, tmp_path, arrays, message):
        with pytest.raises(DataError, match=message):
            everything(opened(Npz, self.write(tmp_path, **arrays)))

    def test_a_truncated_archive(self, tmp_path):
        place = self.write(tmp_path, x=np.zeros((30, 20)))
        place.write_bytes(place.read_bytes()[:-50])
        with pytest.raises(DataError, match=r"no readable \.npz"):
            opened(Npz, place)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_a_flipped_bit(self, tmp_path, save):
        save(tmp_path / "a.npz", x=random_bytes(1031, 5, 7))
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[len(data) // 2] ^= 4
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DataError, match=r"no readable \.npz"):
            everything(opened(Npz, tmp_path / "a.npz"))


class TestWebDataset:
    def put(self, path, members):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    def png(self, pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def test_reads_shards_made_elsewhere(self, tmp_path):
        pixels = random_bytes(24, 5, 7)
        for name, rows in {"train-0": range(11), "train-1": range(11, 20), "test": range(20, 24)}.items():
            members = {}
            for row in rows:
                members |= {f"{row:03d}.png": self.png(pixels[row]), f"{row:03d}.json": json.dumps({"label": row % 2}).encode()}
            self.put(tmp_path / f"{name}.tar", members)
        source = opened(WebDataset, tmp_path)
        about = source.describe()
        assert (about.x.shape, about.task, about.names) == ((1, 5, 7), "classes", ("0", "1"))
        assert about.splits == ("train", "val", "test")
        seen = set()
        for split in about.splits:
            keys, x, labels = everything(source, split)
            rows = [int(key) for key in keys]
            np.testing.assert_array_equal(x[:, 0], pixels[rows])
            assert labels.tolist() == [row % 2 for row in rows]
            seen.update(rows)
        assert seen == set(range(24))
        assert len(source.keys("val")) == 2  # floor(20 / 10)


class TestNamed:
    def test_digits_are_scikit_learns(self):
        from sklearn.datasets import load_digits

        truth = load_digits()
        source = opened(Named, "digits")
        about = source.describe()
        assert (about.x.shape, about.x.range, len(about.names)) == ((1, 8, 8), (0, 16), 10)
        counts = {}
        for split in ("train", "test"):
            keys, x, labels = everything(source, split)
            rows = [int(key.removeprefix("digits-")) for key in keys]
            np.testing.assert_array_equal(x[:, 0], truth.images[rows])
            np.testing.assert_array_equal(labels, truth.target[rows])
            counts[split] = np.bincount(labels)
        whole = np.bincount(truth.target)
        np.testing.assert_array_equal(counts["test"], whole // 5)
        np.testing.assert_array_equal(counts["train"] + counts["test"], whole)

    def test_photos_are_tiles_of_scikit_learns_photographs(self):
        """Pasted back by the number in their keys, they are the photographs: 26 x 40 patches in 427 x 640 pixels."""
        from sklearn.datasets import load_sample_images

        source = opened(Named, "photos")
        about = source.describe()
        assert (about.x.kind, about.x.dtype, about.x.shape, about.x.range) == ("image", "uint8", (3, 16, 16), (0, 255))
        assert (about.task, about.names) == ("classes", ("china", "flower"))
        assert about.licence.startswith("CC BY 2.0")  # of scikit-learn's datasets/images/README.txt
        pasted = np.zeros((2, 416, 640, 3), dtype=np.uint8)
        for split, count in (("train", 1664), ("test", 416)):  # floor(1040 / 5) of each are test
            keys, x, labels = everything(source, split)
            assert np.bincount(labels).tolist() == [count // 2, count // 2]
            for key, patch, label in zip(keys, x, labels, strict=True):
                name, number = key.split("-")
                assert name == about.names[label]
                top, left = (16 * place for place in divmod(int(number), 40))
                pasted[label, top : top + 16, left : left + 16] = patch.transpose(1, 2, 0)
        china, flower = load_sample_images().images
        np.testing.assert_array_equal(pasted, [china[:416], flower[:416]])

    def test_diabetes_is_scikit_learns_in_its_own_units(self):
        from sklearn.datasets import load_diabetes

        truth = load_diabetes(scaled=False)
        source = opened(Named, "diabetes")
        about = source.describe()
        assert (about.x.kind, about.x.dtype, about.x.shape, about.x.range) == ("vector", "float32", (10,), TO_BE_MEASURED)
        assert about.x.features == ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
        assert (about.task, about.names) == ("regression", ("progression",))
        assert "Efron" in about.licence
        seen = []
        for split, count in (("train", 354), ("test", 88)):  # floor(442 / 5)
            keys, x, y = everything(source, split)
            rows = [int(key.removeprefix("diabetes-")) for key in keys]
            assert (len(rows), y.dtype, y.shape) == (count, np.float32, (count, 1))
            np.testing.assert_array_equal(x, truth.data[rows].astype(np.float32))
            np.testing.assert_array_equal(y[:, 0], truth.target[rows])
            seen += rows
        assert sorted(seen) == list(range(442))

    @pytest.mark.parametrize(("name", "rows"), [("breast_cancer", (456, 113)), ("wine", (144, 34)), ("iris", (120, 30))])
    def test_tables_of_classes_are_scikit_learns(self, name, rows):
        from sklearn import datasets

        truth = getattr(datasets, f"load_{name}")()
        source = opened(Named, name)
        about = source.describe()
        assert (about.x.kind, about.x.dtype, about.x.shape) == ("vector", "float32", truth.data.shape[1:])
        assert about.x.features == tuple(truth.feature_names)
        assert (about.task, about.names) == ("classes", tuple(truth.target_names))
        assert about.licence.startswith("CC BY 4.0, UCI")
        seen = []
        for split, count in zip(("train", "test"), rows, strict=True):  # of each class floor(n / 5) are test
            keys, x, labels = everything(source, split)
            numbers = [int(key.removeprefix(f"{name}-")) for key in keys]
            assert len(numbers) == count
            np.testing.assert_array_equal(x, truth.data[numbers].astype(np.float32))
            np.testing.assert_array_equal(labels, truth.target[numbers])
            seen += numbers
        assert sorted(seen) == list(range(len(truth.data)))

    @pytest.mark.parametrize("name", ["digits", "photos", "diabetes", "wine"])
    def test_the_test_split_is_the_lowest_hashes_of_each_class(self, name):
        source = opened(Named, name)
        of = {}
        for split in ("train", "test"):
            keys, _, labels = everything(source, split)
            strata = labels if name != "diabetes" else [0] * len(keys)
            for key, stratum in zip(keys, strata, strict=True):
                of.setdefault(stratum, {"train": [], "test": []})[split].append(hashlib.sha256(key.encode()).hexdigest())
        assert len(of) == {"digits": 10, "photos": 2, "diabetes": 1, "wine": 3}[name]
        for split in of.values():
            assert max(split["test"]) < min(split["train"])
            assert len(split["test"]) == (len(split["test"]) + len(split["train"])) // 5

    def test_mnist_through_openml(self, monkeypatch):
        import sklearn.datasets

        class Bunch:
            data = np.zeros((70_000, 784), dtype=np.float32)
            target = np.array([str(row % 10) for row in range(70_000)], dtype=object)
            details = {"licence": "Public"}  # noqa: RUF012

        Bunch.data[60_000, 29] = 200
        monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *args, **options: Bunch)
        source = opened(Named, "mnist")
        assert (source.describe().licence, source.describe().x.shape) == ("Public", (1, 28, 28))
        assert len(source.keys("train")) == 60_000
        keys, x, labels = everything(source, "test")
        assert (keys[0], x[0, 0, 1, 1], labels[:3].tolist()) == ("test-00000000", 200, [0, 1, 2])

    def test_mnist_without_internet(self, monkeypatch):
        import sklearn.datasets

        def offline(*args, **options):
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
        with pytest.raises(DataError, match=r"cannot be fetched from openml.org.*no route to host.*digits"):
            opened(Named, "mnist")

    def test_a_folder_of_that_name_comes_first(self, tmp_path, monkeypatch):
        (tmp_path / "digits").mkdir()
        monkeypatch.chdir(tmp_path)
        assert not Named.recognises("digits")
