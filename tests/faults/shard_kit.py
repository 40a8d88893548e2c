"""Shards to be damaged: what tests of bad data share."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_ae.data.card import Card, Split, X
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.shards import ShardWriter

SIGNAL = X(kind="signal", dtype="float32", shape=(3, 5), range=(-9, 9))
BLOCK_ROWS, ROWS = 7, 41


def values(rows: int, seed: int = 0) -> np.ndarray:
    """(rows, 3, 5) float32, each row of its own."""
    return np.random.default_rng(seed).normal(size=(rows, *SIGNAL.shape)).astype(np.float32)


def packed(folder: Path, rows: int = ROWS) -> Path:
    """A data set of blocks of 7 rows in shards of two blocks: train with `rows`, and val with 9."""
    splits = {}
    for name, count, seed in (("train", rows, 0), ("val", 9, 1)):
        with ShardWriter(folder, name, block_rows=BLOCK_ROWS, shard_bytes=5120) as writer:
            writer.write([f"{name}-{row}" for row in range(count)], values(count, seed))
        splits[name] = Split(rows=count, shards=writer.close())
    Card(name="toy", x=SIGNAL, splits=splits).save(folder)
    return folder


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def picture(row: int) -> np.ndarray:
    """(4, 6) uint8, other for each row."""
    return np.random.default_rng(row).integers(0, 256, (4, 6), dtype=np.uint8)


def bomb_png(side: int = 30_000) -> bytes:
    """A PNG of `side` x `side` pixels in about a thousandth of the bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = side.to_bytes(4, "big")
    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(side + 1)) for _ in range(min(side, 1_000))) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + b"\x08\0\0\0\0") + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_tar(path: Path, members: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w") as tar:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pictures(rows: Iterable[int]) -> dict[str, bytes]:
    """A PNG and a class for each row."""
    return {
        f"{row:03d}.{kind}": content for row in rows for kind, content in (("png", png(picture(row))), ("cls", b"%d" % (row % 2)))
    }


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def change(path: Path, how: Callable[[bytearray], bytes | bytearray]) -> Path:
    path.write_bytes(how(bytearray(path.read_bytes())))
    return path


def flip(at: int, bit: int = 0) -> Callable[[bytearray], bytearray]:
    def flipped(content: bytearray) -> bytearray:
        content[at] ^= 1 << bit
        return content

    return flipped


def read_all(data: DataSet) -> dict[str, tuple[list[str], np.ndarray]]:
    """{split: (keys, x)} of everything that is there."""
    return {
        name: (data.split(name).keys.tolist(), data.split(name).read(np.arange(data.split(name).rows)))
        for name in data.card.splits
    }
