"""WebDataset shards that were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ssl_ae.data import card
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.remote import is_url
from ssl_ae.data.sources import Block, Description, PackOptions, Source, name_of, path_of, rows_a_block


class WebDataset(Source):
    """A folder of `.tar` shards with one file a sample: `.png`, `.jpg` or `.npy`, and `.cls` or `.json` for its label.

    Such a folder trains as it is; packing makes blocks of it, which are read some fifty times faster. Shards called
    `train...`, `val...`, `test...` are those splits, all others train. Keys are the names of the samples.
    """

    name = "webdataset"
    summary = "a folder of WebDataset shards (.tar) with one file a sample"

    @classmethod
    def recognises(cls, place: str) -> bool:
        if is_url(place):
            return True
        folder = path_of(place)
        return folder.is_dir() and any(folder.glob("*.tar")) and not (folder / card.FILE_NAME).exists()

    def __init__(self, place: str, options: PackOptions) -> None:
        options.allow(self.name)
        self._place = place
        self._data = DataSet.open(place if is_url(place) else path_of(place))

    def describe(self) -> Description:
        found = self._data.card
        task, names = (found.y.task, found.y.names) if found.y else (None, ())
        return Description(name_of(self._place), found.x, task, names, tuple(found.splits))

    def keys(self, split: str) -> Sequence[str]:
        return self._data.split(split).keys.tolist()

    def blocks(self, split: str) -> Iterator[Block]:
        samples, step = self._data.split(split), rows_a_block(self._data.card.x)
        labels = self._data.labels(split) if self._data.card.y else None
        for start in range(0, samples.rows, step):
            rows = np.arange(start, min(start + step, samples.rows))
            yield Block(samples.keys[rows].tolist(), samples.read(rows), None if labels is None else labels[rows])
