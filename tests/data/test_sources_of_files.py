"""The sources that read folders of images and tables."""

import numpy as np
import pytest
from PIL import Image
from source_kit import everything, opened, random_bytes

from ssl_ae import tables
from ssl_ae.data.sources.images import Images
from ssl_ae.data.sources.tables import Table
from ssl_ae.errors import DataError


class TestImages:
    def put(self, path, pixels, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)

    def test_class_folders(self, tmp_path):
        cat, dog, loose, deep = (random_bytes(5, 7, 3, seed=seed) for seed in range(4))
        self.put(tmp_path / "cat" / "one.png", cat)
        self.put(tmp_path / "dog" / "one.PNG", dog)
        self.put(tmp_path / "dog" / "far" / "away.png", deep)
        self.put(tmp_path / "loose.png", loose)
        self.put(tmp_path / "unlabelled" / "x.png", loose)
        self.put(tmp_path / ".hidden.png", loose)
        (tmp_path / "notes.txt").write_text("no image")
        source = opened(Images, tmp_path)
        about = source.describe()
        assert (about.x.shape, about.names, about.splits) == ((3, 5, 7), ("cat", "dog"), ("train",))
        keys, x, labels = everything(source)
        assert keys == ["cat/one", "dog/far/away", "dog/one", "loose", "unlabelled/x"]
        assert labels.tolist() == [0, 1, 1, -1, -1]
        np.testing.assert_array_equal(x[:3], np.stack([cat, deep, dog]).transpose(0, 3, 1, 2))

    def test_a_flat_folder_is_unlabelled_and_grey_stays_one_channel(self, tmp_path):
        grey = random_bytes(5, 7)
        self.put(tmp_path / "a.png", grey)
        Image.fromarray(grey > 99).save(tmp_path / "b.png")  # one bit a pixel
        source = opened(Images, tmp_path)
        assert (source.describe().task, source.describe().x.shape) == (None, (1, 5, 7))
        _, x, labels = everything(source)
        assert labels is None
        np.testing.assert_array_equal(x[:, 0], np.stack([grey, (grey > 99) * np.uint8(255)]))

    @pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK"])
    def test_anything_else_is_rgb_as_pillow_converts_it(self, tmp_path, mode):
        picture = Image.fromarray(random_bytes(5, 7, 3)).convert("L" if mode == "LA" else "RGB").convert(mode)
        picture.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
        self.put(tmp_path / "grey.png", random_bytes(5, 7))
        _, x, _ = everything(opened(Images, tmp_path))
        with Image.open(next(tmp_path.glob("a.*"))) as image:
            np.testing.assert_array_equal(x[0], np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        np.testing.assert_array_equal(x[1], np.broadcast_to(random_bytes(5, 7), (3, 5, 7)))

    def test_split_folders(self, tmp_path):
        for place in ("train/cat/1", "Validation/cat/1", "test/dog/1"):
            self.put(tmp_path / f"{place}.png", random_bytes(2, 3))
        source = opened(Images, tmp_path)
        assert source.describe().splits == ("train", "val", "test")
        assert source.describe().names == ("cat", "dog")
        assert list(source.keys("val")) == ["Validation/cat/1"]
        assert everything(source, "test")[2].tolist() == [1]

    def test_a_turned_photo_is_turned_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn 90 degrees clockwise to see it upright
        pixels = np.zeros((16, 32), dtype=np.uint8)
        pixels[:, :16] = 255  # bright on the left, which clockwise becomes the top
        self.put(tmp_path / "a.jpg", pixels, exif=exif)
        _, x, _ = everything(opened(Images, tmp_path))
        assert x.shape == (1, 1, 32, 16)
        assert x[0, 0, :12].min() > 250
        assert x[0, 0, 20:].max() < 5

    def test_mixed_sizes_need_a_size(self, tmp_path):
        self.put(tmp_path / "a.png", random_bytes(5, 7))
        self.put(tmp_path / "b.png", random_bytes(11, 3))
        with pytest.raises(DataError, match=r"a.png is 5x7, b.png is 11x3 .*--size 5x7"):
            opened(Images, tmp_path)
        _, x, _ = everything(opened(Images, tmp_path, size=(13, 2)))
        assert x.shape == (2, 1, 13, 2)

    def test_images_are_resized_bilinearly_and_only_where_they_must(self, tmp_path):
        pixels = random_bytes(5, 7)
        self.put(tmp_path / "a.png", pixels)
        self.put(tmp_path / "b.png", np.full((11, 3), 77, dtype=np.uint8))
        _, x, _ = everything(opened(Images, tmp_path, size=(5, 7)))
        np.testing.assert_array_equal(x[0, 0], pixels)
        np.testing.assert_array_equal(x[1, 0], np.full((5, 7), 77))

    def test_links_are_followed_but_not_in_a_circle(self, tmp_path):
        self.put(tmp_path / "far" / "1.png", random_bytes(2, 3))
        folder = tmp_path / "photos"
        folder.mkdir()
        (folder / "cat").symlink_to(tmp_path / "far")
        (tmp_path / "far" / "again").symlink_to(folder)
        assert everything(opened(Images, folder))[0] == ["cat/1"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("b.png", b"\x89PNG\r\n\x1a\nnonsense", "b.png (cannot be decoded|is no PNG)"),
            ("b.png", b"plain text", "b.png is no PNG or JPEG"),
            ("b.gif", b"GIF89a", "b.gif is no PNG or JPEG. Convert it"),
            ("a.jpeg", None, "differ only in their ending"),
            ("b.png", "I;16", "more than 8 bits a channel"),
            ("test/b.png", None, "holds test folders, but a.png lies outside them"),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path, name, content, message):
        self.put(tmp_path / "a.png", random_bytes(5, 7))
        if content is None:
            self.put(tmp_path / name, random_bytes(5, 7))
        elif content == "I;16":
            self.put(tmp_path / name, random_bytes(5, 7).astype(np.uint16))
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            opened(Images, tmp_path)

    def test_a_file_cut_short_is_named(self, tmp_path):
        self.put(tmp_path / "a.png", random_bytes(50, 70))
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-1500])
        with pytest.raises(DataError, match=r"a.png cannot be decoded"):
            everything(opened(Images, tmp_path))

    def test_a_decompression_bomb_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow warns above it and refuses above twice as much
        self.put(tmp_path / "a.png", random_bytes(5, 7))
        with pytest.raises(DataError, match=r"a.png is too large"):
            opened(Images, tmp_path)

    def test_a_size_of_nothing(self, tmp_path):
        self.put(tmp_path / "a.png", random_bytes(5, 7))
        with pytest.raises(DataError, match="--size 0x7"):
            opened(Images, tmp_path, size=(0, 7))

    def test_options_of_other_sources_are_refused(self, tmp_path):
        self.put(tmp_path / "a.png", random_bytes(5, 7))
        with pytest.raises(DataError, match="--label means nothing to the source 'images': it knows --size and --task"):
            opened(Images, tmp_path, label="y")


class TestTable:
    csv = "key,height,label,width\nb7,1.5,cat,2\na1,-3e2,,4\nc0,0,dog, 5\n"

    def test_csv(self, tmp_path):
        (tmp_path / "pets.csv").write_text(self.csv)
        source = opened(Table, tmp_path / "pets.csv")
        about = source.describe()
        assert (about.name, about.x.kind, about.x.features) == ("pets", "vector", ("height", "width"))
        assert (about.task, about.names, about.splits) == ("classes", ("cat", "dog"), ("train",))
        keys, x, labels = everything(source)
        assert keys == ["b7", "a1", "c0"]
        np.testing.assert_array_equal(x, np.array([[1.5, 2], [-300, 4], [0, 5]], dtype=np.float32))
        assert labels.tolist() == [0, -1, 1]

    def test_parquet_in_a_folder_of_splits(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(1031, 2)).astype(np.float32)
        for name, rows in {"train-00001": slice(500, None), "train-00000": slice(500), "test": slice(7)}.items():
            part = x[rows]
            columns = {"u": part[:, 0], "v": part[:, 1].astype(np.float64), "grade": np.arange(len(part)) % 3}
            if name == "test":
                columns = {"v": columns["v"], "u": columns["u"]}  # another order, and no labels
            tables.write_parquet(tmp_path / f"{name}.parquet", columns)
        source = opened(Table, tmp_path, label="grade")
        assert source.describe().splits == ("train", "test")
        keys, found, labels = everything(source)
        assert (keys[0], keys[-1]) == ("train-00000000", "train-00001030")
        np.testing.assert_array_equal(found, x)
        assert labels.tolist() == [row % 3 for row in range(500)] + [row % 3 for row in range(531)]
        _, found, labels = everything(source, "test")
        np.testing.assert_array_equal(found, x[:7])
        assert labels.tolist() == [-1] * 7

    def test_without_a_label_every_column_is_a_feature(self, tmp_path):
        (tmp_path / "a.csv").write_text("u,v\n1,2\n3,4\n")
        source = opened(Table, tmp_path / "a.csv")
        assert (source.describe().task, everything(source)[2]) == (None, None)
        assert everything(source)[0] == ["train-00000000", "train-00000001"]

    def test_several_targets(self, tmp_path):
        (tmp_path / "a.csv").write_text("u,v,w\n1,2,0.5\n3,,4\n")
        source = opened(Table, tmp_path / "a.csv", label="v,w")
        assert (source.describe().task, source.describe().names) == ("regression", ("v", "w"))
        np.testing.assert_array_equal(everything(source)[2], np.array([[2, 0.5], [np.nan, 4]], dtype=np.float32))

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            ("tall", r"a.csv: row 9001, column 'height' holds the text 'tall'.*Correct the cell"),
            ("nan", r"row 9001, column 'height' holds nan"),
            ("", r"row 9001, column 'height' holds an empty cell"),
            ("1e39", r"row 9001, column 'height' holds 1e39"),  # beyond float32
        ],
    )
    def test_a_bad_cell_is_named_by_file_row_column_and_value(self, tmp_path, cell, message):
        rows = [f"{row},1" for row in range(9000)] + [f"{cell},1"]  # beyond the first batch that is read
        (tmp_path / "a.csv").write_text("height,label\n" + "\n".join(rows) + "\n")
        with pytest.raises(DataError, match=message):
            everything(opened(Table, tmp_path / "a.csv"))

    def test_a_missing_number_in_parquet(self, tmp_path):
        tables.write_parquet(tmp_path / "a.parquet", {"u": np.ma.masked_array([1, 2, 3], mask=[False, True, False])})
        with pytest.raises(DataError, match=r"row 2, column 'u' holds nan"):
            everything(opened(Table, tmp_path / "a.parquet"))

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ("u,label\n1,a\n", {"label": "lable"}, "no column 'lable' for --label.*Did you mean label"),
            ("u,label\n1,a\n", {"key": "id"}, "no column 'id' for --key"),
            ("key,label\n1,a\n", {}, "no column left for features"),
            ("u,v\n", {}, "holds no rows"),
            ("1.5,2.5\n3,4\n", {}, "begins with numbers instead of column names"),
            (",u\n0,4\n", {}, "column 1 of .* has no name"),
            ("key,u\n,4\n", {}, "key column 'key' is empty"),
            ("u,v\n1,2\n", {"task": "classes"}, "no labels for --task classes"),
            ("u,v\n1,2,3\n", {}, "a.csv cannot be read"),
        ],
    )
    def test_tables_that_cannot_be_used(self, tmp_path, content, options, message):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            opened(Table, tmp_path / "a.csv", **options)

    @pytest.mark.parametrize(
        ("test", "message"), [("u\n1\n", "no column 'v'"), ("u,v,w\n1,2,3\n", "has the column 'w', unknown to train.csv")]
    )
    def test_files_of_other_columns(self, tmp_path, test, message):
        (tmp_path / "train.csv").write_text("u,v\n1,2\n")
        (tmp_path / "test.csv").write_text(test)
        with pytest.raises(DataError, match=f"test.csv .*{message}|test.csv {message}"):
            opened(Table, tmp_path)

    def test_a_label_file_beside_images_is_no_table(self, tmp_path):
        (tmp_path / "labels.csv").write_text("key,label\na,cat\n")
        assert not Table.recognises(str(tmp_path))
