"""What tests of sources share."""

import numpy as np

from ssl_ae.data.sources import PackOptions
from ssl_ae.data.sources.idx import Idx
from ssl_ae.data.sources.images import Images
from ssl_ae.data.sources.latents import StoredLatents
from ssl_ae.data.sources.npz import Npz
from ssl_ae.data.sources.sklearn import Named
from ssl_ae.data.sources.tables import Table
from ssl_ae.data.sources.webdataset import WebDataset

KINDS = (Idx, Npz, Images, StoredLatents, Table, WebDataset, Named)


def opened(kind, place, **options):
    assert [other for other in KINDS if other.recognises(str(place))] == [kind]
    return kind(str(place), PackOptions(**options))


def everything(source, split="train"):
    """(keys, x, labels) of a split; the keys known beforehand are those that come with the samples."""
    blocks = list(source.blocks(split))
    keys = [key for block in blocks for key in block.keys]
    assert keys == list(source.keys(split))
    labels = None if blocks[0].labels is None else np.concatenate([block.labels for block in blocks])
    return keys, np.concatenate([block.x for block in blocks]), labels


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
