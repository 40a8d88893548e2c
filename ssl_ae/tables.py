"""Parquet and CSV tables as numpy columns: the only room that knows pyarrow."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ssl_ae import files
from ssl_ae.errors import DataError, did_you_mean, listing

ROWS_A_BATCH = 8192
SAMPLED_ROWS = 1000  # that tell whether the words of a column repeat


@dataclass(frozen=True)
class Table:
    """The columns of a file, each (n,) or (n, K).

    Text is an object array of str (None where null), whole numbers with nulls are a masked array, other numbers with
    nulls hold NaN there.
    """

    columns: dict[str, np.ndarray]
    metadata: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def write_parquet(
    path: Path, columns: Mapping[str, np.ndarray | Sequence[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write equally long columns; the file appears whole or not at all, and equal columns give equal bytes.

    A float array (n, K) becomes fixed_size_list<float>[K]; a masked array has nulls under its mask; a sequence or an
    object array holds str or None. Every page carries a checksum, so `read_parquet` notices a flipped bit.
    """
    arrays = {name: _to_arrow(column) for name, column in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(dict(metadata) if metadata else None)
    with files.whole_file(path) as aside:
        try:
            pq.write_table(table, aside, write_page_checksum=True, **_encoding(table))
        except OSError as error:
            if error.errno in files.FULL:
                raise
            raise DataError(f"{path} cannot be written: {os.strerror(error.errno or 5)}. Choose another place for it.") from error


def _encoding(table: pa.Table) -> dict[str, Any]:
    """How each column is stored: dictionaries for words that come again and again, floats as they are.

    A dictionary of floats or of keys, each of which comes once, made latents five times as slow to write and 15 % larger;
    zstd makes them a quarter smaller for a third more time, and nobody searches codes by their smallest and largest number.
    """
    lists = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    words = [field.name for field in table.schema if pa.types.is_string(field.type) and _repeats(table[field.name])]
    others = [name for name in table.column_names if name not in lists]
    return {
        "use_dictionary": words,
        "compression": dict.fromkeys(others, "zstd") | {f"{name}.list.element": "none" for name in lists},
        "write_statistics": others,
    }


def _repeats(column: pa.ChunkedArray) -> bool:
    """Whether a text column says the same few words in its first rows."""
    first = column.slice(0, SAMPLED_ROWS)
    return pc.count_distinct(first).as_py() < 0.5 * len(first)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Table:
    """All columns, or those named, in the order named. Raises DataError for a file that is absent or damaged."""
    with _readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        _require(path, file.schema_arrow.names, columns or ())
        table = file.read(columns=None if columns is None else list(columns))
        names = table.column_names if columns is None else columns
        return Table({name: _to_numpy(table.column(name)) for name in names}, _text_metadata(table.schema.metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_parquet` was given beside the columns. Raises DataError for a file that is absent or damaged."""
    with _readable(path):
        return _text_metadata(pq.read_schema(path).metadata)


def columns_of(path: Path) -> tuple[str, ...]:
    """Names of a Parquet file's columns. Raises DataError for a file that is absent or damaged."""
    with _readable(path):
        return tuple(pq.read_schema(path).names)


def footer_sha256(path: Path) -> str:
    """Of what says where the columns lie: pages have checksums, and the footer has none. Raises DataError."""
    with _readable(path), open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def read_batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a .csv or .parquet file, some thousands at a time; memory is bounded by the batch.

    Every cell of a CSV is text, as it stands in the file ("" where empty), so that the caller can say which cell is
    wrong. Columns of Parquet keep their type; numbers with nulls are floats with NaN there.
    """
    if path.suffix.lower() == ".csv":
        return _csv_batches(path)
    return _parquet_batches(path)


def _parquet_batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    with _readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=ROWS_A_BATCH):
            yield {name: _without_mask(_to_numpy(pa.chunked_array([batch.column(name)]))) for name in batch.schema.names}


def _csv_batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    with _readable(path):
        with pa.csv.open_csv(path) as first:
            names = first.schema.names
        _refuse_repeated(path, names)
        names_alone = True
        as_text = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
        with pa.csv.open_csv(path, convert_options=as_text) as batches:
            for batch in batches:
                yield {name: _to_numpy(pa.chunked_array([batch.column(name)])) for name in names}
                names_alone = False
        if names_alone:
            yield {name: np.empty(0, dtype=object) for name in names}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:  # of a footer that holds nonsense
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read: {reason}. Write the file again or name another.") from error


def _require(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    _refuse_repeated(path, present)
    for name in wanted:
        if name not in present:
            hint = did_you_mean(name, present)
            raise DataError(f"{path} has no column {name!r}; it has {listing(present, 'and')}.{hint}")


def _refuse_repeated(path: Path, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has the column {repeated[0]!r} more than once. Rename one of them.")


def _text_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in (metadata or {}).items()}


def _to_arrow(column: np.ndarray | Sequence[Any]) -> pa.Array:
    if not isinstance(column, np.ndarray) or column.dtype.kind in "OUT":
        return _text_to_arrow(column)
    if column.ndim == 2:
        flat = pa.array(np.ascontiguousarray(column, dtype=np.float32).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
    if isinstance(column, np.ma.MaskedArray):
        return pa.array(column.data, mask=np.ma.getmaskarray(column))
    return pa.array(column)


def _text_to_arrow(column: np.ndarray | Sequence[Any]) -> pa.Array:
    if isinstance(column, np.ndarray) and column.dtype.kind == "T":  # numpy's own text, which arrow does not know: in parts,
        starts = range(0, max(1, len(column)), ROWS_A_BATCH)  # because as Python's strings it takes four times the memory
        return pa.concat_arrays([pa.array(column[at : at + ROWS_A_BATCH].tolist(), type=pa.string()) for at in starts])
    try:
        return pa.array(column, type=pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # paths, numbers: by their str
        return pa.array([None if value is None else str(value) for value in column], type=pa.string())


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _to_numpy(column.cast(kind.value_type))
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _lists_to_numpy(column)
    if column.null_count and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        missing = column.is_null().to_numpy()
        under_mask = False if pa.types.is_boolean(kind) else 0
        return np.ma.masked_array(column.fill_null(under_mask).to_numpy(), mask=missing)
    return column.to_numpy()


def _lists_to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """(n, K) float32 where every list has K numbers, NaN in the rows that are null; else n Python lists."""
    lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
    numeric = pa.types.is_floating(column.type.value_type) or pa.types.is_integer(column.type.value_type)
    if not numeric or len(lengths) > 1:
        ragged = np.empty(len(column), dtype=object)
        ragged[:] = column.to_pylist()
        return ragged
    width = lengths[0] if lengths else getattr(column.type, "list_size", 0)
    flat = pc.list_flatten(column).to_numpy().astype(np.float32, copy=False).reshape(-1, width)
    if not column.null_count:
        return flat
    found = np.full((len(column), width), np.nan, dtype=np.float32)
    found[column.is_valid().to_numpy()] = flat
    return found


def _without_mask(column: np.ndarray) -> np.ndarray:
    return column.astype(np.float64).filled(np.nan) if isinstance(column, np.ma.MaskedArray) else column
