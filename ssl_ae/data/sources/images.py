"""Folders of PNG and JPEG files, one sub-folder a class."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl_ae.data.card import SPLITS, X
from ssl_ae.data.keys import as_keys, repeated
from ssl_ae.data.sources import Block, Description, PackOptions, Source, holds_latents, name_of, path_of, rows_a_block
from ssl_ae.errors import DataError, listing

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = {".png", ".jpg", ".jpeg"}
OTHER_ENDINGS = {".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic"}
FORMATS = ("PNG", "JPEG")
ROWS_A_PART = 8192
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
        return folder.is_dir() and not holds_latents(folder) and any(_ending(inside) in ENDINGS for inside in _walk(folder))

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name, "size", "task")
        if options.task not in (None, "classes"):
            raise DataError(f"--task {options.task} needs numbers, but sub-folders of images are classes. Leave it out.")
        if options.size is not None and min(options.size) < 1:
            raise DataError(f"--size {options.size[0]}x{options.size[1]}: height and width are at least 1 pixel.")
        self._folder, self._size = path_of(place), options.size
        self._files, self._above = _by_split(self._folder)
        _refuse_repeated_keys(self._folder, self._files)
        self._x = self._survey()
        names = {self._label_of(inside) for files in self._files.values() for inside in files} - {None}
        self._classes = tuple(sorted(names))

    def describe(self) -> Description:
        task = "classes" if self._classes else None
        return Description(name_of(str(self._folder)), self._x, task, self._classes, tuple(self._files))

    def keys(self, split: str) -> Sequence[str]:
        return _keys_of(self._files[split])

    def blocks(self, split: str) -> Iterator[Block]:
        index = {name: position for position, name in enumerate(self._classes)}
        files, rows = self._files[split], rows_a_block(self._x)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
            for start in range(0, len(files), rows):
                part = files[start : start + rows]
                x = np.stack(list(pool.map(self._decode, part)))
                labels = np.array([index.get(self._label_of(inside), -1) for inside in part], dtype=np.int64)
                yield Block(_keys_of(part).tolist(), x, labels if self._classes else None)

    def _label_of(self, inside: str) -> str | None:
        """The folder of a file, below that of its split."""
        classes = inside.split("/")[self._above : -1]
        return classes[0] if classes and classes[0].lower() not in UNLABELLED_FOLDERS else None

    def _survey(self) -> X:
        """The shape of every sample, from the headers of all files."""
        first, facts = None, None
        grey = True
        for inside in chain.from_iterable(self._files.values()):
            facts = _facts_of(self._folder / inside)
            grey = grey and facts.grey
            first = first or (inside, facts.size)
            if self._size is None and facts.size != first[1]:
                (height, width), (other_height, other_width) = first[1], facts.size
                raise DataError(
                    f"{self._folder} holds images of mixed size: {first[0]} is "
                    f"{height}x{width}, {inside} is {other_height}x{other_width} "
                    f"(height x width). Give --size HEIGHTxWIDTH, for instance --size {height}x{width}."
                )
        height, width = self._size or first[1]
        return X(kind="image", dtype="uint8", shape=(1 if grey else 3, height, width), range=(0, 255))

    def _decode(self, inside: str) -> np.ndarray:
        """(C, H, W) uint8."""
        path = self._folder / inside
        from PIL import ImageOps
        from PIL.Image import Resampling

        channels, height, width = self._x.shape
        with _opened(path) as image:
            upright = ImageOps.exif_transpose(image) if image.format == "JPEG" else image
            upright = upright.convert("L" if channels == 1 else "RGB")
        if self._size is not None and upright.size != (width, height):
            upright = upright.resize((width, height), Resampling.BILINEAR)
        pixels = np.asarray(upright, dtype=np.uint8)
        if pixels.shape[:2] != (height, width):
            raise DataError(f"{path} changed its size while it was packed. Pack again once nothing writes to it.")
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _walk(folder: Path, inside: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all files below a folder, from there, sorted; hidden ones are left out, links followed, but never in a circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                names.append(entry.name)
                if entry.is_dir():
                    folders.add(entry.name)
    for name in sorted(names):
        if name in folders:
            yield from _walk(folder / name, f"{inside}{name}/", (*above, here))
        else:
            yield inside + name


def _ending(inside: str) -> str:
    return os.path.splitext(inside)[1].lower()


def _by_split(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """The images of each split, by `as_keys`, and how many folders stand above those of the classes."""
    found: dict[str, list[np.ndarray]] = {}
    for part in _in_parts(_images_in(folder)):
        found.setdefault(_split_of(part[0]), []).append(as_keys(part))
    files = {split: np.concatenate(parts) for split, parts in found.items()}
    if "" in files:
        if len(files) > 1:
            raise DataError(
                f"{folder} holds {listing([name for name in files if name], 'and')} folders, but {files[''][0]} lies outside "
                "them. Move it into one of them."
            )
        return {"train": files[""]}, 0
    if "train" not in files:
        raise DataError(f"{folder} holds images for {listing(files, 'and')}, but none in a folder train. Add it.")
    return {split: files[split] for split in SPLITS if split in files}, 1


def _images_in(folder: Path) -> Iterator[str]:
    for inside in _walk(folder):
        ending = _ending(inside)
        if ending in OTHER_ENDINGS:
            raise DataError(f"{folder / inside} is no PNG or JPEG. Convert it, or move it out of {folder}.")
        if ending in ENDINGS:
            try:
                inside.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"the file name {os.fsencode(inside)!r} is not UTF-8. Rename it.") from error
            yield inside


def _in_parts(files: Iterator[str]) -> Iterator[list[str]]:
    """The files of one split some thousands at a time: as Python's strings they take four times the memory."""
    for _, mine in groupby(files, _split_of):
        while part := list(islice(mine, ROWS_A_PART)):
            yield part


def _split_of(inside: str) -> str:
    """The split whose folder a file lies in, "" outside of all."""
    first, slash, _ = inside.partition("/")
    return SPLIT_FOLDERS.get(first.lower(), "") if slash else ""


def _keys_of(files: np.ndarray) -> np.ndarray:
    return as_keys([os.path.splitext(inside)[0] for inside in files])


def _refuse_repeated_keys(folder: Path, splits: dict[str, np.ndarray]) -> None:
    key = repeated([_keys_of(files) for files in splits.values()])
    if key is not None:
        one, other, *_ = (inside for files in splits.values() for inside in files if os.path.splitext(inside)[0] == key)
        raise DataError(f"{folder / one} and {folder / other} differ only in their ending, which keys leave out. Rename one.")


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
