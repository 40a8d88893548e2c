"""The plain files of a tar, by its headers alone: POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU's long names.

Python's tarfile reads more kinds of archive, but makes an object of every field of every header: for a million samples,
minutes instead of seconds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_ae.errors import DataError

BLOCK = 512  # bytes: a header, and what the content of a file is padded to
END = bytes(2 * BLOCK)
HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x 155s 12x")  # name, size, checksum, kind, prefix
CHECKSUM = slice(148, 156)  # counts as blanks in its own sum
ADLER_BASE = 65521
PLAIN, OLD_PLAIN, CONTIGUOUS = b"0", b"\0", b"7"
EMPTY = b"123456"  # links, devices, folders: nothing follows their header, whatever size it says
PAX, PAX_OF_ALL, LONG_NAME, LONG_LINK, SPARSE = b"x", b"g", b"L", b"K", b"S"
LONGEST_EXTRA = 2**20  # bytes of a long name or of pax records


class Member(NamedTuple):
    """A plain file in a tar: where its content lies in the shard, in bytes."""

    name: str
    offset: int
    size: int

    def of(self, data: np.ndarray) -> np.ndarray:
        """(size,) uint8: its bytes in those of the shard."""
        return data[self.offset : self.offset + self.size]


def members(path: Path, data: np.ndarray) -> Iterator[Member]:
    """The plain files in the bytes `data` of the tar `path`, in their order.

    Raises DataError unless every header is sound, every file is there to its end, and the archive ends as one must.
    """
    view, at = memoryview(data), 0
    of_all: dict[bytes, bytes] = {}
    of_next: dict[bytes, bytes] = {}  # what pax records and a long name say of the file that follows
    while (header := bytes(view[at : at + BLOCK])) != END[:BLOCK]:
        try:
            name, size, kind = _read(header)
            said = of_all | of_next
            size = int(said.get(b"size", size))
        except (ValueError, struct.error) as error:
            raise DataError(damaged(path, f"no sound header and no end of the archive at byte {at:,}")) from error
        start = at + BLOCK
        follows = 0 if kind in EMPTY else size
        if size < 0 or start + follows > len(view):
            raise DataError(damaged(path, f"{_text(name)} ends after its {len(view):,} bytes"))
        at = start + padded(follows)
        if kind in (PAX, PAX_OF_ALL, LONG_NAME, LONG_LINK):
            if size > LONGEST_EXTRA:
                raise DataError(damaged(path, f"{size:,} bytes of names and records at byte {start:,}"))
            _take_extra(path, kind, bytes(view[start : start + size]), of_all if kind == PAX_OF_ALL else of_next)
            continue
        of_next = {}
        if kind == SPARSE or any(key.startswith(b"GNU.sparse") for key in said):
            raise DataError(f"{path}: {_text(name)} is stored as a sparse file. Make the shard again without --sparse.")
        name = said.get(b"path", name)
        if kind in (PLAIN, CONTIGUOUS) or (kind == OLD_PLAIN and not name.endswith(b"/")):
            yield Member(_decoded(path, name), start, size)
    if bytes(view[at : at + len(END)]) != END:
        raise DataError(damaged(path, f"no sound header and no end of the archive at byte {at:,}"))


def padded(size: int) -> int:
    """What `size` bytes take in a tar, which pads every file to whole blocks of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def damaged(path: Path, reason: str) -> str:
    return f"{path} is truncated or damaged ({reason}). Pack the source again, or fetch the shard again."


def _read(header: bytes) -> tuple[bytes, int, bytes]:
    """Name with its prefix, size and kind. Raises ValueError or struct.error where the header is not sound."""
    name, size, checksum, kind, prefix = HEADER.unpack(header)
    _check_sum(header, _number(checksum))
    name, prefix = name.partition(b"\0")[0], prefix.partition(b"\0")[0]
    return (prefix + b"/" + name if prefix and kind not in (LONG_NAME, LONG_LINK) else name), _number(size), kind


def _check_sum(header: bytes, stated: int) -> None:
    """The sum of the header's bytes, those of the checksum taken for blanks; some old writers added signed bytes."""
    rest = header[: CHECKSUM.start], header[CHECKSUM.stop :]
    # adler32's lower half is 1 + the sum of all bytes modulo ADLER_BASE, ten times as fast as Python's sum
    adler = zlib.adler32(rest[1], zlib.adler32(rest[0])) & 0xFFFF
    blanks = 8 * ord(" ")
    if adler == (stated - blanks + 1) % ADLER_BASE:
        return
    unsigned = sum(rest[0]) + sum(rest[1]) + blanks
    if stated != unsigned - 256 * sum(byte > 127 for part in rest for byte in part):
        raise ValueError("checksum")


def _number(field: bytes) -> int:
    """Octal digits, or (GNU) big-endian binary behind a first byte of 0x80. Raises ValueError."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _take_extra(path: Path, kind: bytes, content: bytes, into: dict[bytes, bytes]) -> None:
    if kind == LONG_NAME:
        into[b"path"] = content.partition(b"\0")[0]
    elif kind != LONG_LINK:
        try:
            into |= _records(content.rstrip(b"\0"))
        except ValueError as error:
            raise DataError(damaged(path, f"pax records of {len(content):,} bytes are not sound")) from error


def _records(content: bytes) -> dict[bytes, bytes]:
    """pax(1): `LENGTH KEY=VALUE` and a line feed, LENGTH being that of the whole record. Raises ValueError."""
    found, start = {}, 0
    while start < len(content):
        blank = content.index(b" ", start)
        stop = start + int(content[start:blank])
        if not blank < stop <= len(content) or content[stop - 1 : stop] != b"\n":
            raise ValueError("length")
        key, _, found[key] = content[blank + 1 : stop - 1].partition(b"=")
        start = stop
    return found


def _decoded(path: Path, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the name {name!r} is not UTF-8. Make the shard again with such names.") from error


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
