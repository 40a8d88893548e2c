"""Every built-in keeps the contract that plugins are held to, with the options that change what it computes."""

import pytest
from ssl_ae_builtins import conv, heads, linear, mlp, noise, penalties, table_heads

from ssl_ae.registry import Registry
from ssl_ae.testing import checks_for

POSTERIORS = [{"posterior": "point"}, {"posterior": "diag"}, {"posterior": "full"}]
OUTPUTS = [
    *({"variance": variance} for variance in ("unit", "scalar", "feature", "decoder")),
    {"likelihood": "bernoulli"},
    {"likelihood": "categorical", "levels": 7},
]

CASES = [
    *((linear.LinearEncoder, options) for options in [*POSTERIORS, {"bias": False}]),
    *((mlp.MlpEncoder, {"widths": [13], **options}) for options in [*POSTERIORS, {"batch_norm": True}]),
    (mlp.MlpEncoder, {"widths": []}),
    *((conv.ConvEncoder, {"channels": [3, 2], **options}) for options in [*POSTERIORS, {"batch_norm": True}, {"kernel": 5}]),
    *((linear.LinearDecoder, options) for options in [*OUTPUTS, {"bias": False}]),
    *((mlp.MlpDecoder, {"widths": [13], **options}) for options in [*OUTPUTS, {"batch_norm": True}]),
    (mlp.MlpDecoder, {}),
    *((conv.ConvDecoder, {"channels": [2, 3], **options}) for options in [*OUTPUTS, {"batch_norm": True}]),
    (conv.ConvDecoder, {}),
    *((penalties.Weights, {"norm": norm}) for norm in ("l1", "l2")),
    (penalties.SparseL1, {}),
    (penalties.SparseL1, {"layers": ["h*", "code"]}),
    (penalties.Kl, {}),
    (noise.Dropout, {}),
    (noise.GaussianNoise, {}),
    (noise.MaskingNoise, {"layers": ["input", "h1"]}),
    (heads.Softmax, {}),
    (heads.Mlp, {"widths": [13]}),
    (heads.Gaussian, {}),
    (heads.BernoulliHead, {}),
    (table_heads.Logistic, {}),
    *((table_heads.Knn, {"metric": metric}) for metric in ("euclidean", "cosine", "manhattan")),
    *((entry.cls, {}) for entry in Registry.discover().of_kind("source")),
]


def parameters():
    for cls, options in CASES:
        given = ",".join(f"{key}={value}" for key, value in options.items())
        for name, function in checks_for(cls, **options):
            yield pytest.param(function, id=f"{cls.__name__}({given})-{name}".replace(" ", ""))


@pytest.mark.parametrize("check", list(parameters()))
def test_contract(check):
    check()


def test_no_builtin_is_left_out():
    owned = {entry.cls for entry in Registry.discover().entries if entry.plugin.name == "builtins"}
    assert owned == {cls for cls, _ in CASES}
