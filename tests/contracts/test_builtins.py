"""Every built-in keeps the contract that plugins are held to, with the options that change what it computes."""

import pytest
from ssl_ae_builtins import (
    auto,
    conditional,
    consistency,
    contractive,
    conv,
    crop_flip,
    cutout,
    distortion,
    factor_analysis,
    grayscale,
    hash,
    heads,
    image_spreading,
    label_spreading,
    ladder,
    linear,
    lista,
    mixup,
    mlp,
    noise,
    penalties,
    pseudo_labels,
    sparse_coding,
    sparse_kl,
    stack,
    table_heads,
    unit_norm,
    vat,
)

from ssl_ae.registry import Registry
from ssl_ae.testing import checks_for

POSTERIORS = [{"posterior": "point"}, {"posterior": "diag"}, {"posterior": "full"}]
OUTPUTS = [
    *({"variance": variance} for variance in ("unit", "scalar", "feature", "decoder")),
    {"likelihood": "bernoulli"},
    {"likelihood": "categorical", "levels": 7},
]

CASES = [  # (class, options, partners it is tried beside where the kit's plain components do not fit)
    *((linear.LinearEncoder, options) for options in [*POSTERIORS, {"bias": False}]),
    *((mlp.MlpEncoder, {"widths": [13], **options}) for options in [*POSTERIORS, {"batch_norm": True}]),
    (mlp.MlpEncoder, {"widths": []}),
    (mlp.MlpEncoder, {"widths": "auto", "depth": 3, "code_activation": "tanh"}),
    *((stack.StackEncoder, options) for options in ({"widths": [13]}, {"widths": "auto", "activation": "relu"})),
    *((conv.ConvEncoder, {"channels": [3, 2], **options}) for options in [*POSTERIORS, {"batch_norm": True}, {"kernel": 5}]),
    *((hash.HashEncoder, {"widths": [13], **options}) for options in [{}, {"batch_norm": True}, {"sampling": "gumbel"}]),
    (hash.HashEncoder, {"widths": [13], "sampling": "gumbel", "levels": 17}),
    *((linear.LinearDecoder, options) for options in [*OUTPUTS, {"bias": False}]),
    *((mlp.MlpDecoder, {"widths": [13], **options}) for options in [*OUTPUTS, {"batch_norm": True}]),
    (mlp.MlpDecoder, {}),
    (mlp.MlpDecoder, {"widths": "auto", "depth": 3}),
    *((conv.ConvDecoder, {"channels": [2, 3], **options}) for options in [*OUTPUTS, {"batch_norm": True}]),
    (conv.ConvDecoder, {}),
    *(
        (conditional.ConditionalMlpEncoder, {"widths": [13], "classifier": [7], **options}, conditional.ConditionalMlpDecoder)
        for options in [*POSTERIORS, {"batch_norm": True}]
    ),
    *((conditional.ConditionalMlpDecoder, {"widths": [13], **options}) for options in [*OUTPUTS, {"batch_norm": True}]),
    (conditional.LabelKl, {}, conditional.ConditionalMlpEncoder, conditional.ConditionalMlpDecoder),
    (factor_analysis.FactorAnalysisEncoder, {}, factor_analysis.FactorAnalysisDecoder, penalties.Kl),
    *((factor_analysis.FactorAnalysisDecoder, {"noise": kind}) for kind in ("feature", "scalar")),
    (sparse_coding.SparseCoding, {}, linear.LinearDecoder, penalties.SparseL1),
    (sparse_coding.SparseCoding, {"sparsity": 0.1, "iterations": 7}, linear.LinearDecoder, (penalties.SparseL1, {"weight": 0.1})),
    *((lista.Lista, {"steps": steps}) for steps in (0, 3)),
    *((ladder.LadderEncoder, {"widths": [13], **options}) for options in [{}, {"activation": "tanh"}]),
    (ladder.LadderEncoder, {"widths": "auto"}, ladder.LadderDecoder, ladder.Ladder),
    *((ladder.LadderDecoder, {"top": top}, ladder.LadderEncoder) for top in ("softmax", "code")),
    (ladder.Ladder, {"costs": [3, 1]}, ladder.LadderEncoder, ladder.LadderDecoder),
    *((penalties.Weights, {"norm": norm}) for norm in ("l1", "l2")),
    (penalties.SparseL1, {}),
    (penalties.SparseL1, {"layers": ["h*", "code"]}),
    (penalties.Kl, {}),
    (sparse_kl.SparseKl, {"rho": 0.2}, (mlp.MlpEncoder, {"widths": [13], "code_activation": "sigmoid"})),
    (sparse_kl.SparseKl, {"layers": ["h*"]}, (mlp.MlpEncoder, {"widths": [13], "activation": "sigmoid"})),
    *((unit_norm.UnitNorm, {"norm": norm}, linear.LinearDecoder) for norm in ("equal", "at_most")),
    (contractive.Contractive, {}),
    *(
        (consistency.Consistency, options)
        for options in [{"threshold": 0.2}, {"threshold": 0.2, "target": "soft", "sharpen": 0.5, "align": True}]
    ),
    (vat.Vat, {}),
    (pseudo_labels.PseudoLabels, {}),
    (noise.Dropout, {}),
    (noise.GaussianNoise, {}),
    (noise.MaskingNoise, {"layers": ["input", "h1"]}),
    (noise.SaltPepper, {}),
    *((distortion.Distortion, options) for options in [{}, {"border": "reflection"}]),
    (noise.ColumnSwap, {}),
    *((crop_flip.CropFlip, {"padding": 2, "border": border}) for border in ("zeros", "border", "reflection")),
    (cutout.Cutout, {"side": 0.4}),
    (mixup.Mixup, {}),
    (grayscale.Grayscale, {}),
    *((heads.Softmax, options) for options in ({}, {"weights": False})),
    (heads.Mlp, {"widths": [13]}),
    *((heads.Gaussian, options) for options in ({}, {"variance": "unit"})),
    (heads.BernoulliHead, {}),
    (table_heads.Logistic, {}),
    *((label_spreading.LabelSpreading, {"prior": prior}) for prior in ("none", "uniform", "labels")),
    (label_spreading.LabelSpreading, {"metric": "auto", "k": "auto", "sharpen": 2}),
    *((image_spreading.ImageLabelSpreading, {"beside": beside, "sharpen": 2}) for beside in ("latents", "samples")),
    *((auto.Auto, {"trees": 13, "network": network}) for network in (False, True)),
    *((table_heads.Knn, {"metric": metric}) for metric in ("euclidean", "cosine", "manhattan")),
    *((entry.cls, {}) for entry in Registry.discover().of_kind("source")),
]


def parameters():
    for cls, options, *partners in CASES:
        given = ",".join(f"{key}={value}" for key, value in options.items())
        for name, function in checks_for(cls, *partners, **options):
            yield pytest.param(function, id=f"{cls.__name__}({given})-{name}".replace(" ", ""))


@pytest.mark.parametrize("check", list(parameters()))
def test_contract(check):
    check()


def test_no_builtin_is_left_out():
    owned = {entry.cls for entry in Registry.discover().entries if entry.plugin.name == "builtins"}
    assert owned == {cls for cls, *_ in CASES}
