"""The techniques that ship with ssl-ae. They come in through the same door as everyone else's: an entry point and five hooks."""

from __future__ import annotations

import ssl_ae
from ssl_ae.data.sources import Source
from ssl_ae.data.sources.idx import Idx
from ssl_ae.data.sources.images import Images
from ssl_ae.data.sources.latents import StoredLatents
from ssl_ae.data.sources.npz import Npz
from ssl_ae.data.sources.sklearn import Named
from ssl_ae.data.sources.tables import Table
from ssl_ae.data.sources.webdataset import WebDataset
from ssl_ae_builtins.auto import Auto
from ssl_ae_builtins.conditional import ConditionalMlpDecoder, ConditionalMlpEncoder, LabelKl
from ssl_ae_builtins.consistency import Consistency
from ssl_ae_builtins.contractive import Contractive
from ssl_ae_builtins.conv import ConvDecoder, ConvEncoder
from ssl_ae_builtins.crop_flip import CropFlip
from ssl_ae_builtins.cutout import Cutout
from ssl_ae_builtins.distortion import Distortion
from ssl_ae_builtins.factor_analysis import FactorAnalysisDecoder, FactorAnalysisEncoder
from ssl_ae_builtins.grayscale import Grayscale
from ssl_ae_builtins.hash import HashEncoder
from ssl_ae_builtins.heads import BernoulliHead, Gaussian, Mlp, Softmax
from ssl_ae_builtins.image_spreading import ImageLabelSpreading
from ssl_ae_builtins.label_spreading import LabelSpreading
from ssl_ae_builtins.ladder import Ladder, LadderDecoder, LadderEncoder
from ssl_ae_builtins.linear import LinearDecoder, LinearEncoder
from ssl_ae_builtins.lista import Lista
from ssl_ae_builtins.mixup import Mixup
from ssl_ae_builtins.mlp import MlpDecoder, MlpEncoder
from ssl_ae_builtins.noise import ColumnSwap, Dropout, GaussianNoise, MaskingNoise, SaltPepper
from ssl_ae_builtins.penalties import Kl, SparseL1, Weights
from ssl_ae_builtins.pseudo_labels import PseudoLabels
from ssl_ae_builtins.sparse_coding import SparseCoding
from ssl_ae_builtins.sparse_kl import SparseKl
from ssl_ae_builtins.stack import StackEncoder
from ssl_ae_builtins.table_heads import Knn, Logistic
from ssl_ae_builtins.unit_norm import UnitNorm
from ssl_ae_builtins.vat import Vat


@ssl_ae.hookimpl
def ssl_ae_encoders() -> list[type[ssl_ae.Encoder]]:
    return [
        LinearEncoder,
        MlpEncoder,
        ConvEncoder,
        FactorAnalysisEncoder,
        StackEncoder,
        SparseCoding,
        Lista,
        HashEncoder,
        LadderEncoder,
        ConditionalMlpEncoder,
    ]


@ssl_ae.hookimpl
def ssl_ae_decoders() -> list[type[ssl_ae.Decoder]]:
    return [LinearDecoder, MlpDecoder, ConvDecoder, FactorAnalysisDecoder, LadderDecoder, ConditionalMlpDecoder]


@ssl_ae.hookimpl
def ssl_ae_regularizers() -> list[type[ssl_ae.Regularizer]]:
    return [
        Weights,
        Dropout,
        GaussianNoise,
        MaskingNoise,
        SaltPepper,
        ColumnSwap,
        Distortion,
        CropFlip,
        Cutout,
        Mixup,
        Grayscale,
        SparseL1,
        Kl,
        LabelKl,
        SparseKl,
        UnitNorm,
        Contractive,
        Consistency,
        Vat,
        Ladder,
        PseudoLabels,
    ]


@ssl_ae.hookimpl
def ssl_ae_heads() -> list[type[ssl_ae.Head] | type[ssl_ae.TableHead]]:
    return [Softmax, Mlp, Gaussian, BernoulliHead, Logistic, Knn, LabelSpreading, ImageLabelSpreading, Auto]


@ssl_ae.hookimpl
def ssl_ae_sources() -> list[type[Source]]:
    return [Idx, Npz, Images, StoredLatents, Table, WebDataset, Named]
