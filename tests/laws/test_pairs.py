"""Any encoder with any regularizer: the pair trains, or the recipe is refused when it is resolved, with the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import CONSTANT, REGISTRY, feed_of, trainer_of

from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card, X, Y
from ssl_ae.errors import RecipeError
from ssl_ae.model import build, check_layers
from ssl_ae.resolve import Resolved, resolve

SHAPE = (3, 7, 5)
X_ROWS = np.random.default_rng(0).random((13, *SHAPE)).astype(np.float32)
CARD = Card(
    name="pairs",
    x=X(kind="image", dtype="float32", shape=SHAPE, range=(0.0, 1.0)),
    y=Y(task="classes", names=("a", "b", "c")),
    splits={},
)
LATENT = 6
TRAINING = {"epochs": 1, "batch_size": 7, "optimizer": {"name": "adam"}, "schedule": CONSTANT, "ema": 0.9, "log_every": 1}

ENCODERS = [entry.cls for entry in REGISTRY.entries if entry.kind == "encoder"]
REGULARIZERS = [entry.cls for entry in REGISTRY.entries if entry.kind == "regularizer"]
DECODERS = [entry.cls.name for entry in REGISTRY.entries if entry.kind == "decoder"]
# what else a recipe says where a component demands it
COMPANIONS: list[list[dict[str, Any]]] = [[], [{"name": "sparse_l1", "weight": 0.1}], [{"name": "kl"}]]
CHOICES = {
    "posterior": ["point", "diag", "full"],
    "activation": ["relu", "sigmoid"],
    "code_activation": ["identity", "sigmoid"],
    "batch_norm": [False, True],
    "sampling": ["noise", "gumbel"],
    "sparsity": [0.1],  # the weight of the companion
}

LAYERS: list[dict[str, Any]] = [{}, {"layers": ["h*"]}, {"layers": ["code"]}]

POINT = "a posterior that is certain has no divergence from a prior"
ATOMS = "atoms are the columns of the linear decoder, and this encoder has its own"
ACTIVITY = "no layer has values in [0, 1], whose mean would be an activity"
RUNGS = "only the ladder encoder has the layers that the ladder compares"
COLUMNS = "pixels are no columns that mean the same in every row"
UNLABELLED = "its decoder is one of the linear ones, which no label enters"
OTHER_WALK = "the layers of q(z|x, y) exist once a label, and activities are means over the rows"
LABELLED = "its decoder reads the label, and so is none of the linear ones, which have atoms"
CONSTANT_CODE = "the code carries no gradient to the sample"
IMPOSSIBLE = {
    **{(encoder, "kl"): POINT for encoder in ("stack", "sparse_coding", "lista", "ladder")},
    ("factor_analysis", "unit_norm"): ATOMS,
    **{(encoder, "sparse_kl"): ACTIVITY for encoder in ("linear", "factor_analysis", "sparse_coding", "lista")},
    **{(cls.name, "ladder"): RUNGS for cls in ENCODERS if cls.name != "ladder"},
    **{(cls.name, "column_swap"): COLUMNS for cls in ENCODERS},
    **{(encoder, "label_kl"): UNLABELLED for encoder in ("factor_analysis", "sparse_coding")},
    ("conditional_mlp", "sparse_kl"): OTHER_WALK,
    ("conditional_mlp", "unit_norm"): LABELLED,
    ("sparse_coding", "contractive"): CONSTANT_CODE,
    ("sparse_coding", "vat"): CONSTANT_CODE,
}


def variants(cls: type) -> Iterator[dict[str, Any]]:
    """The encoder as it comes, and with each option that may decide whether a regularizer fits changed alone."""
    yield {"name": cls.name}
    for option, values in CHOICES.items():
        if option in cls.Config.model_fields:
            default = cls.Config.model_fields[option].default
            yield from ({"name": cls.name, option: value} for value in values if value != default)


def recipes_of(encoder: dict[str, Any], regularizer: str) -> Iterator[dict[str, Any]]:
    """Recipes with the pair, each with another decoder, other layers or other penalties beside it."""
    weight = {"weight": 0.1} if regularizer == "sparse_l1" else {}
    decoders = sorted(DECODERS, key=lambda name: name != encoder["name"])
    for layers, decoder, companions, slices in itertools.product(LAYERS, decoders, COMPANIONS, ({}, {"slice_epochs": 0})):
        beside = [entry for entry in companions if entry["name"] != regularizer]
        model = {
            "latent_dim": LATENT,
            "encoder": encoder,
            "decoder": {"name": decoder},
            "regularizers": [{"name": regularizer, **layers, **weight}, *beside],
        }
        yield {
            "name": "pairs",
            "data": {"path": ".", "scale": "none"},
            "model": model,
            "pretrain": {**TRAINING, **slices},
            "finetune": TRAINING,
        }


def attempts(encoder: type, regularizer: type) -> Iterator[Resolved | str]:
    """For each variant of the encoder the first recipe that is not refused, else the shortest complaint."""
    for variant in variants(encoder):
        complaints = []
        for tree in recipes_of(variant, regularizer.name):
            try:
                found = resolve(recipes.parse(tree), REGISTRY, CARD, "pairs")
                torch.manual_seed(0)
                check_layers(build(found, head=False), found.shapes)
            except RecipeError as error:
                complaints.append(str(error))
            else:
                yield found
                break
        else:
            yield min(complaints, key=len)


def train(found: Resolved) -> dict[str, float]:
    """Every reading of one epoch through the real loop: the slices' too, where there are any."""
    torch.manual_seed(0)
    model = build(found, head=False)
    trainer = trainer_of(found, "pretrain", feed_of(X_ROWS, dtype=torch.float32), model)
    readings: dict[str, float] = {}
    for entry in trainer.run().history:
        readings |= entry
    assert trainer.progress.step == trainer.plan.steps
    assert all(p.isfinite().all() for p in model.parameters())
    return readings


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda cls: cls.name)
def test_a_pair_trains_or_is_refused_with_the_reason(encoder, regularizer):
    trained = 0
    for outcome in attempts(encoder, regularizer):
        if isinstance(outcome, str):
            assert encoder.name in outcome or regularizer.name in outcome  # it says who does not fit
            assert ": " in outcome
            continue
        readings = train(outcome)
        wild = {name: value for name, value in readings.items() if not math.isfinite(value)}
        assert not wild, outcome.as_dict()["model"]
        assert "train/skipped_steps" not in readings
        trained += 1
    assert (trained == 0) == ((encoder.name, regularizer.name) in IMPOSSIBLE)
