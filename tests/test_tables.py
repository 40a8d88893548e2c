"""Parquet and CSV as numpy columns; pyarrow itself is the oracle."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_ae import tables
from ssl_ae.errors import DataError

LATENT = np.arange(35, dtype=np.float32).reshape(7, 5)  # 7 rows of 5 units: no swapped axis passes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "latents" / "part-0.parquet"
    label = np.ma.masked_array(np.arange(7), mask=np.arange(7) == 3)
    columns = {"key": [f"k{row}" for row in range(7)], "label": label, "latent": LATENT, "nats": np.linspace(0, 1, 7)}
    tables.write_parquet(path, columns, {"schema": "1", "recipe": "β-VAE"})
    return path


def test_columns_come_back_as_they_went(path):
    table = tables.read_parquet(path)
    assert table.names == ("key", "label", "latent", "nats")
    assert table.rows == 7
    assert table["key"].tolist() == [f"k{row}" for row in range(7)]
    assert table["label"].tolist() == [0, 1, 2, None, 4, 5, 6]
    assert table["latent"].dtype == np.float32
    np.testing.assert_array_equal(table["latent"], LATENT)
    np.testing.assert_array_equal(table["nats"], np.linspace(0, 1, 7))
    assert table.metadata == {"schema": "1", "recipe": "β-VAE"}


def test_pyarrow_sees_the_promised_schema(path):
    schema = pq.read_schema(path)
    assert schema.field("key").type == pa.string()
    assert schema.field("label").type == pa.int64()
    assert schema.field("latent").type == pa.list_(pa.float32(), 5)
    assert pq.read_table(path)["latent"].to_pylist() == LATENT.tolist()


def test_chosen_columns_come_in_the_order_asked(path):
    assert tables.read_parquet(path, ["nats", "key"]).names == ("nats", "key")


def test_equal_columns_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        tables.write_parquet(tmp_path / name, {"key": ["x", None], "z": LATENT[:2]}, {"m": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(pa.ArrowException):
        tables.write_parquet(tmp_path / "a.parquet", {"key": ["x"], "z": np.ones(2)})
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_in_the_data_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)
    tables.write_parquet(path, {"z": noise})
    sound = path.read_bytes()
    pages = pq.read_metadata(path).row_group(0).column(0)
    start, length = (
        pages.data_page_offset,
        pages.total_compressed_size - (pages.data_page_offset - (pages.dictionary_page_offset or pages.data_page_offset)),
    )
    for at in range(start + length // 4, start + length, 97):  # past the page header
        damaged = bytearray(sound)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
            tables.read_parquet(path)


def test_a_missing_column_names_those_that_are_there(path):
    with pytest.raises(DataError, match=r"no column 'latents'; it has key, label, latent and nats\. Did you mean latent\?"):
        tables.read_parquet(path, ["latents"])


@pytest.mark.parametrize("read", [tables.read_parquet, lambda path: list(tables.read_batches(path))])
def test_what_is_no_parquet_file_is_named(tmp_path, read):
    with pytest.raises(DataError, match=r"none\.parquet does not exist"):
        read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("key,label\n")
    with pytest.raises(DataError, match=r"text\.parquet cannot be read"):
        read(tmp_path / "text.parquet")


def test_columns_of_other_writers(tmp_path):
    """Lists of any kind, dictionaries, booleans and nulls, as pandas and others write them."""
    path = tmp_path / "other.parquet"
    columns = {
        "equal": pa.array([[1.0, 2.0], None, [3.0, 4.0]]),
        "ragged": pa.array([[1], [2, 3], []]),
        "category": pa.array(["b", "a", "b"]).dictionary_encode(),
        "flag": pa.array([True, None, False]),
        "number": pa.array([1.5, None, 2.5]),
    }
    pq.write_table(pa.table(columns), path)
    table = tables.read_parquet(path)
    np.testing.assert_array_equal(table["equal"], np.array([[1, 2], [np.nan, np.nan], [3, 4]], np.float32))
    assert table["ragged"].tolist() == [[1], [2, 3], []]
    assert table["category"].tolist() == ["b", "a", "b"]
    assert table["flag"].tolist() == [True, None, False]
    np.testing.assert_array_equal(table["number"], [1.5, np.nan, 2.5])


def test_batches_of_parquet_keep_types_and_show_nulls_as_nan(tmp_path):
    path = tmp_path / "long.parquet"
    number = np.ma.masked_array(np.arange(20_011), mask=np.arange(20_011) == 10_007)
    tables.write_parquet(path, {"key": [str(row) for row in range(20_011)], "number": number})
    batches = list(tables.read_batches(path))
    assert max(len(batch["key"]) for batch in batches) <= tables.ROWS_A_BATCH
    joined = np.concatenate([batch["number"] for batch in batches])
    assert np.flatnonzero(np.isnan(joined)).tolist() == [10_007]
    assert batches[0]["number"].dtype == np.int64  # no null among the first rows
    assert [key for batch in batches for key in batch["key"]] == [str(row) for row in range(20_011)]


def test_csv_cells_are_text_as_they_stand(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('key,n,note\nk1,007,"a, b"\nk2,,NA\n')
    [batch] = tables.read_batches(path)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "key": ["k1", "k2"],
        "n": ["007", ""],
        "note": ["a, b", "NA"],
    }


def test_a_csv_longer_than_a_block_is_read_in_parts_with_one_type(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("n\n" + "1\n" * 1_000_003 + "one\n")  # text after a megabyte of numbers
    parts = [batch["n"] for batch in tables.read_batches(path)]
    assert len(parts) > 1
    assert sum(map(len, parts)) == 1_000_004
    assert parts[-1][-1] == "one"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read: Empty CSV file"),
        (b"a,b\n1,2\n3\n", "Expected 2 columns, got 1"),
        (b"a,a\n1,2\n", "column 'a' more than once"),
        (b"a,b\n\xff,2\n", "invalid UTF8"),
    ],
)
def test_a_bad_csv_is_explained(tmp_path, content, complaint):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        list(tables.read_batches(tmp_path / "bad.csv"))
