"""The techniques that ship with ssl-ae. They come in through the same door as everyone else's: an entry point and five hooks."""

from __future__ import annotations

import ssl_ae
from ssl_ae.data.sources import Source
from ssl_ae.data.sources.idx import Idx
from ssl_ae.data.sources.images import Images
from ssl_ae.data.sources.npz import Npz
from ssl_ae.data.sources.sklearn import Named
from ssl_ae.data.sources.tables import Table
from ssl_ae.data.sources.webdataset import WebDataset
from ssl_ae_builtins.conv import ConvDecoder, ConvEncoder
from ssl_ae_builtins.heads import BernoulliHead, Gaussian, Mlp, Softmax
from ssl_ae_builtins.linear import LinearDecoder, LinearEncoder
from ssl_ae_builtins.mlp import MlpDecoder, MlpEncoder
from ssl_ae_builtins.noise import Dropout, GaussianNoise, MaskingNoise
from ssl_ae_builtins.penalties import Kl, SparseL1, Weights
from ssl_ae_builtins.table_heads import Knn, Logistic


@ssl_ae.hookimpl
def ssl_ae_encoders() -> list[type[ssl_ae.Encoder]]:
    return [LinearEncoder, MlpEncoder, ConvEncoder]


@ssl_ae.hookimpl
def ssl_ae_decoders() -> list[type[ssl_ae.Decoder]]:
    return [LinearDecoder, MlpDecoder, ConvDecoder]


@ssl_ae.hookimpl
def ssl_ae_regularizers() -> list[type[ssl_ae.Regularizer]]:
    return [Weights, Dropout, GaussianNoise, MaskingNoise, SparseL1, Kl]


@ssl_ae.hookimpl
def ssl_ae_heads() -> list[type[ssl_ae.Head] | type[ssl_ae.TableHead]]:
    return [Softmax, Mlp, Gaussian, BernoulliHead, Logistic, Knn]


@ssl_ae.hookimpl
def ssl_ae_sources() -> list[type[Source]]:
    return [Idx, Npz, Images, Table, WebDataset, Named]
