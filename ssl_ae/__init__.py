"""ssl-ae: a good classifier and a reusable representation from a lot of unlabelled data and a few labels.

The names below are what plugin authors use. They are imported when first asked for, so that `import ssl_ae` (and with it
`ssl-ae --help`) does not import torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "hookimpl": "hookspecs",
    "Config": "components",
    "Encoder": "components",
    "Decoder": "components",
    "Regularizer": "components",
    "Head": "components",
    "TableHead": "components",
    "Network": "components",
    "Findings": "findings",
    "Shapes": "trace",
    "Batch": "trace",
    "Pass": "trace",
    "Trace": "trace",
    "Over": "trace",
    "Need": "trace",
    "UNLABELED": "trace",
    "Point": "latent",
    "Latent": "latent",
    "BernoulliCode": "latent",
    "CategoricalCode": "latent",
    "kl_to_standard_normal": "latent",
    "kl_to_prior": "latent",
    "BatchMoments": "moments",
    "Tiles": "pictures",
    "Histogram": "pictures",
    "Lines": "pictures",
    "Likelihood": "likelihood",
    "testing": "",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_ae' has no attribute {name!r}")
    module = importlib.import_module(f"ssl_ae.{_HOMES[name] or name}")
    return getattr(module, name) if _HOMES[name] else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
