"""The walk over a tar's headers: Python's tarfile is the oracle for what is written and for what is found."""

import io
import tarfile

import numpy as np
import pytest

from ssl_ae.data import tar
from ssl_ae.errors import DataError

NAMES = ["a.png", "folder/b.cls", "deep/" * 40 + "c.npy", "ü" * 60 + ".png", "d" * 99 + "/" + "e" * 99 + ".json"]


def archive(path, form, names=NAMES, **info):
    with tarfile.open(path, "w", format=form) as file:
        for size, name in enumerate(names, start=510):  # around a block of 512 bytes
            member = tarfile.TarInfo(name)
            member.size = size
            for field, value in info.items():
                setattr(member, field, value)
            file.addfile(member, io.BytesIO(bytes([size % 256]) * size))
    return path


def walk(path):
    return list(tar.members(path, np.fromfile(path, np.uint8)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("info", [{}, {"mtime": 1.5}, {"uid": 2**40, "uname": "ü"}])
def test_tarfile_finds_the_same(tmp_path, form, info):
    if form == tarfile.GNU_FORMAT and "mtime" in info:
        info = {"mtime": 1}
    path = archive(tmp_path / "a.tar", form, **info)
    with tarfile.open(path) as oracle:
        assert walk(path) == [(member.name, member.offset_data, member.size) for member in oracle]


def test_a_prefix_of_ustar_belongs_to_the_name(tmp_path):
    names = ["d" * 90 + "/" + "e" * 90]
    assert [member.name for member in walk(archive(tmp_path / "a.tar", tarfile.USTAR_FORMAT, names))] == names


def test_what_is_no_file_is_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("x")
            member.type, member.linkname = kind, "y"
            file.addfile(member)
        file.addfile(tarfile.TarInfo("z"))
    assert [member.name for member in walk(path)] == ["z"]


def header(path, changes):
    """The bytes of a tar of one file with some of its first header's replaced, and the checksum made right again."""
    content = bytearray(archive(path, tarfile.USTAR_FORMAT, ["a"]).read_bytes())
    for at, new in changes.items():
        content[at : at + len(new)] = new
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({124: b"77777777777\0"}, "a ends after its"),
        ({124: b"\xff" * 12}, "a ends after its"),  # GNU's binary form of -1
        ({124: b"12x4567"}, "no sound header and no end of the archive at byte 0"),
        ({156: b"S"}, "sparse"),
        ({156: b"x"}, "pax records of 510 bytes are not sound"),
        ({0: b"\xfc\xfc"}, "not UTF-8"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, changes, complaint):
    with pytest.raises(DataError, match=complaint):
        walk(header(tmp_path / "a.tar", changes))


def test_signed_checksums_of_old_writers_are_sound(tmp_path):
    path = archive(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["ü"])
    content = bytearray(path.read_bytes())
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in content[:512])
    path.write_bytes(content)
    assert [member.name for member in walk(path)] == ["ü"]


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"x" * 600])
def test_what_ends_otherwise_is_no_tar(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no sound header and no end"):
        walk(path)
