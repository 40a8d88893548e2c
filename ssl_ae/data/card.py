"""The card of a data set: what a sample is, what a label is, and which shards hold which rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssl_ae import files
from ssl_ae.errors import DataError, did_you_mean, listing

FILE_NAME = "card.json"
LABELS_FILE_NAME = "labels.parquet"
SPLITS = ("train", "val", "test")

Task = Literal["classes", "regression", "multilabel"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class X(_Frozen):
    """One sample as it is stored. Images are channels first, (C, H, W); vectors (D,); signals (C, T)."""

    kind: Literal["image", "vector", "signal"]
    dtype: Literal["uint8", "float32"]
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    range: tuple[float, float] = Field(description="smallest and largest value a sample may hold (images: of the format)")
    features: tuple[str, ...] | None = Field(None, description="column names of a vector")
    mean: tuple[float, ...] | None = Field(None, description="of each feature of a vector over the train split")
    std: tuple[float, ...] | None = Field(None, description="of each feature, 1 where a feature is constant")

    @property
    def size(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape)


class Y(_Frozen):
    """What the labels mean: names of the classes (their index is the stored label), or names of the targets."""

    task: Task
    names: tuple[str, ...] = Field(min_length=1)


class Shard(_Frozen):
    file: str = Field(pattern=r"^[^/\\\x00]+\.tar$", description="name of a file beside the card, nowhere else")
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Split(_Frozen):
    rows: int = Field(ge=0)
    shards: tuple[Shard, ...]


class Card(_Frozen):
    """`card.json`. Two cards are the same data set exactly when their `fingerprint` is the same."""

    format: Literal[1] = 1
    name: str
    x: X
    y: Y | None = Field(None, description="nothing when the source has no labels")
    splits: dict[Literal["train", "val", "test"], Split]
    labels_sha256: str | None = Field(None, description="of labels.parquet as it was packed")
    source: str = ""
    licence: str = ""
    left_out: dict[str, tuple[int, ...] | None] = Field(
        {}, description="by data.damaged: skip: damaged rows of a shard, nothing where all of it is damaged"
    )

    @property
    def fingerprint(self) -> str:
        """sha256 over what the samples are: not over labels, names or where they came from."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return files.digest({"x": self.x.model_dump(), "shards": shards} | left_out)

    def save(self, folder: Path) -> None:
        files.write_json(folder / FILE_NAME, self.model_dump(mode="json", exclude=set() if self.left_out else {"left_out"}))

    @classmethod
    def load(cls, folder: Path) -> Card:
        path = folder / FILE_NAME
        try:
            return cls.model_validate(files.read_json(path))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no {FILE_NAME}. Make the data set with `ssl-ae data pack SOURCE {folder}`."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}: {place}: {first['msg']}. Pack the source again.") from error
        except (ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}. Pack the source again.") from error

    def split(self, name: str) -> Split:
        if name not in self.splits:
            there = f"it has {listing(self.splits, 'and')}.{did_you_mean(name, self.splits)}"
            raise DataError(f"data set {self.name!r} has no split {name!r}; {there}")
        return self.splits[name]
