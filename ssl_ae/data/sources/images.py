"""Folders of PNG and JPEG files, one sub-folder a class."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl_ae.data.card import SPLITS, X
from ssl_ae.data.sources import Block, Description, PackOptions, Source, name_of, path_of, rows_a_block
from ssl_ae.errors import DataError, listing

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = {".png", ".jpg", ".jpeg"}
OTHER_ENDINGS = {".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic"}
FORMATS = ("PNG", "JPEG")
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED_FOLDERS = {"unlabelled", "unlabeled"}
SIXTEEN_BITS = ("I", "F")  # first letter of Pillow's modes with more than 8 bits a channel
SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    label: str | None


@dataclass(frozen=True)
class _Facts:
    """What the header of an image file says."""

    size: tuple[int, int]  # height, width as a viewer shows it
    grey: bool


class Images(Source):
    """A folder of `.png`, `.jpg` and `.jpeg` files.

    A sub-folder is a class, and what lies deeper inside belongs to it; a file outside every sub-folder, or in one
    called `unlabelled`, has no label. Above the classes there may be the folders `train`, `val` and `test`. Keys are
    the paths below the folder without their endings, `train/cat/0017`. Grey images stay one channel where all are grey;
    all else becomes RGB, transparency dropped. A JPEG that its camera marked as turned is turned upright. Images of
    mixed size need --size, which resizes every image to exactly that height and width, bilinearly.
    """

    name = "images"
    summary = "a folder of png and jpeg files, one sub-folder a class, or flat without labels"
    resizes = True

    @classmethod
    def recognises(cls, place: str) -> bool:
        folder = path_of(place)
        return folder.is_dir() and any(path.suffix.lower() in ENDINGS for path in _walk(folder))

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name, "size", "task")
        if options.task not in (None, "classes"):
            raise DataError(f"--task {options.task} needs numbers, but sub-folders of images are classes. Leave it out.")
        if options.size is not None and min(options.size) < 1:
            raise DataError(f"--size {options.size[0]}x{options.size[1]}: height and width are at least 1 pixel.")
        self._folder, self._size = path_of(place), options.size
        self._files = _by_split(self._folder)
        _refuse_repeated_keys(self._files)
        self._x = self._survey()
        names = {file.label for files in self._files.values() for file in files if file.label is not None}
        self._classes = tuple(sorted(names))

    def describe(self) -> Description:
        task = "classes" if self._classes else None
        return Description(name_of(str(self._folder)), self._x, task, self._classes, tuple(self._files))

    def keys(self, split: str) -> Sequence[str]:
        return [file.key for file in self._files[split]]

    def blocks(self, split: str) -> Iterator[Block]:
        index = {name: position for position, name in enumerate(self._classes)}
        files, rows = self._files[split], rows_a_block(self._x)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
            for start in range(0, len(files), rows):
                part = files[start : start + rows]
                x = np.stack(list(pool.map(self._decode, part)))
                labels = np.array([index.get(file.label, -1) for file in part], dtype=np.int64)
                yield Block([file.key for file in part], x, labels if self._classes else None)

    def _survey(self) -> X:
        """The shape of every sample, from the headers of all files."""
        first, facts = None, None
        grey = True
        for file in (file for files in self._files.values() for file in files):
            facts = _facts_of(file.path)
            grey = grey and facts.grey
            first = first or (file, facts.size)
            if self._size is None and facts.size != first[1]:
                (height, width), (other_height, other_width) = first[1], facts.size
                raise DataError(
                    f"{self._folder} holds images of mixed size: {first[0].path.relative_to(self._folder)} is "
                    f"{height}x{width}, {file.path.relative_to(self._folder)} is {other_height}x{other_width} "
                    f"(height x width). Give --size HEIGHTxWIDTH, for instance --size {height}x{width}."
                )
        height, width = self._size or first[1]
        return X(kind="image", dtype="uint8", shape=(1 if grey else 3, height, width), range=(0, 255))

    def _decode(self, file: _File) -> np.ndarray:
        """(C, H, W) uint8."""
        from PIL import ImageOps
        from PIL.Image import Resampling

        channels, height, width = self._x.shape
        with _opened(file.path) as image:
            upright = ImageOps.exif_transpose(image) if image.format == "JPEG" else image
            upright = upright.convert("L" if channels == 1 else "RGB")
        if self._size is not None and upright.size != (width, height):
            upright = upright.resize((width, height), Resampling.BILINEAR)
        pixels = np.asarray(upright, dtype=np.uint8)
        if pixels.shape[:2] != (height, width):
            raise DataError(f"{file.path} changed its size while it was packed. Pack again once nothing writes to it.")
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below a folder, sorted; hidden ones are left out, links are followed, but never in a circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, here))
        else:
            yield folder / entry.name


def _by_split(folder: Path) -> dict[str, list[_File]]:
    found: dict[str, list[_File]] = {}
    for path in _walk(folder):
        if path.suffix.lower() in OTHER_ENDINGS:
            raise DataError(f"{path} is no PNG or JPEG. Convert it, or move it out of {folder}.")
        if path.suffix.lower() not in ENDINGS:
            continue
        inside = path.relative_to(folder)
        split = SPLIT_FOLDERS.get(inside.parts[0].lower()) if len(inside.parts) > 1 else None
        classes = inside.parts[:-1] if split is None else inside.parts[1:-1]
        label = classes[0] if classes and classes[0].lower() not in UNLABELLED_FOLDERS else None
        found.setdefault(split or "", []).append(_File(path, _key_of(inside), label))
    if "" in found:
        if len(found) > 1:
            loose = found[""][0].path.relative_to(folder)
            raise DataError(
                f"{folder} holds {listing([name for name in found if name], 'and')} folders, but {loose} lies outside "
                "them. Move it into one of them."
            )
        return {"train": found[""]}
    if "train" not in found:
        raise DataError(f"{folder} holds images for {listing(found, 'and')}, but none in a folder train. Add it.")
    return {split: found[split] for split in SPLITS if split in found}


def _key_of(inside: Path) -> str:
    key = inside.with_suffix("").as_posix()
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {os.fsencode(inside)!r} is not UTF-8. Rename it.") from error
    return key


def _refuse_repeated_keys(splits: dict[str, list[_File]]) -> None:
    seen: dict[str, Path] = {}
    for file in (file for files in splits.values() for file in files):
        other = seen.setdefault(file.key, file.path)
        if other != file.path:
            raise DataError(f"{other} and {file.path} differ only in their ending, which keys leave out. Rename one.")


def _facts_of(path: Path) -> _Facts:
    from PIL.Image import DecompressionBombWarning

    with warnings.catch_warnings():
        # Pillow warns of an image so large that it may be an attack on the memory: here that is an error
        warnings.simplefilter("error", DecompressionBombWarning)
        return _read_facts(path)


def _read_facts(path: Path) -> _Facts:
    with _opened(path) as image:
        if image.mode.startswith(SIXTEEN_BITS):
            raise DataError(f"{path} has more than 8 bits a channel (mode {image.mode}). Convert it to 8 bits.")
        width, height = image.size
        if image.format == "JPEG" and image.getexif().get(ORIENTATION) in SIDEWAYS:
            width, height = height, width
        return _Facts((height, width), image.mode in ("1", "L"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} is too large: {error}. Make it smaller or move it away.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no PNG or JPEG, whatever its name says. Convert it or move it away.") from error
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG
        raise DataError(f"{path} cannot be decoded: {error}. Replace it or move it away.") from error
