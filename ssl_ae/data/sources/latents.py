"""The latents of a run as samples: a model on top of another's code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssl_ae.data.card import SPLITS, X
from ssl_ae.data.sources import TO_BE_MEASURED, Block, Description, PackOptions, Source, holds_latents, path_of, rows_a_block
from ssl_ae.data.sources.targets import UNLABELED, Targets, targets_of
from ssl_ae.errors import DataError


class StoredLatents(Source):
    """A run's `latents` folder, as `ssl-ae extract` writes it: each code a vector, under the key and label of its sample.

    Splits stay what they are. The table knows classes by their numbers, so these are their names. With --draw SEED, train rows
    are one draw from N(latent, latent_std^2) each: dimensions that say nothing of a sample are then noise, which a model of the
    codes cannot learn by heart (Kingma et al. 2014, the authors' code). Rows to be judged by keep their means.
    """

    name = "latents"
    summary = "the latents folder of a run: its codes as vectors, with keys, labels and splits"

    @classmethod
    def recognises(cls, place: str) -> bool:
        return holds_latents(path_of(place))

    def __init__(self, place: str, options: PackOptions) -> None:
        from ssl_ae import latents, tables  # here, because pyarrow takes its time and every command imports the sources

        options.allow(self.name, "draw")
        self._place = path_of(place)
        folders = {split: self._place / split for split in SPLITS if (self._place / split / latents.MANIFEST).is_file()}
        self._parts = {split: latents.finished_parts(folder) for split, folder in folders.items()}
        self._keys: dict[str, list[str]] = {}
        labels, self._before, total = [], {}, 0
        for split, parts in self._parts.items():
            found = [self._read(part, ["key", "label"]) for part in parts]
            self._keys[split] = [key for part in found for key in part["key"]]
            labels += [latents.filled(part["label"]) for part in found]
            self._before[split], total = total, total + len(self._keys[split])
        self._targets = _targets(np.concatenate(labels), latents.task_of(folders["train"]), str(self._place))
        width = self._read(self._parts["train"][0], ["latent"])["latent"].shape[1]
        self._draw = options.draw
        if options.draw is not None and "latent_std" not in tables.columns_of(self._parts["train"][0]):
            raise DataError(f"{place} holds no latent_std: the codes of its encoder are certain. Leave --draw out.")
        self._x = X(kind="vector", dtype="float32", shape=(width,), range=TO_BE_MEASURED)

    def describe(self) -> Description:
        name = f"{self._place.resolve().parent.name}-latents"
        return Description(name, self._x, self._targets.task, self._targets.names, tuple(self._parts))

    def keys(self, split: str) -> Sequence[str]:
        return self._keys[split]

    def blocks(self, split: str) -> Iterator[Block]:
        start, step, labels = 0, rows_a_block(self._x), self._targets.values
        for index, part in enumerate(self._parts[split]):
            x = self._codes(part, index, drawn=self._draw is not None and split == "train")
            for rows in (x[begin : begin + step] for begin in range(0, len(x), step)):
                stop, before = start + len(rows), self._before[split]
                mine = None if labels is None else labels[before + start : before + stop]
                yield Block(self._keys[split][start:stop], rows, mine)
                start = stop

    def _codes(self, path: Path, index: int, drawn: bool) -> np.ndarray:
        """(n, K) float32 of part number `index`."""
        if not drawn:
            return self._read(path, ["latent"])["latent"]
        table = self._read(path, ["latent", "latent_std"])
        noise = np.random.default_rng([self._draw, index]).standard_normal(table["latent"].shape, dtype=np.float32)
        return table["latent"] + table["latent_std"] * noise

    def _read(self, path: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
        from ssl_ae import tables

        table = tables.read_parquet(path, columns)
        wrong = ~np.isfinite(table["latent"]).all(1) if "latent" in columns else np.zeros(1, bool)
        if wrong.any():
            raise DataError(f"{path}: row {int(wrong.argmax()) + 1} has a latent that is not finite. Extract again.")
        return table.columns


def _targets(labels: np.ndarray, task: str | None, place: str) -> Targets:
    if task is None or (labels.ndim == 1 and (labels == UNLABELED).all()):
        return Targets()
    columns = {"label": labels} if labels.ndim == 1 else {f"target{i + 1}": column for i, column in enumerate(labels.T)}
    return targets_of(columns, task, place)
