"""Baselines: labels alone, without and with the recipe's perturbations; PCA as scikit-learn has it."""

import numpy as np
import pytest
from engine_kit import resolved
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from ssl_ae import recipe as recipes
from ssl_ae.data.dataset import DataSet
from ssl_ae.progress import Reporter
from ssl_ae.stages.baselines import (
    fit_baselines,
    fit_components,
    fit_linear,
    linear_model,
    networks_of,
    predict_baselines,
    scaled,
)
from ssl_ae.stages.labels import Labels, labels_of
from ssl_ae.stages.workspace import open_workspace

NOISE = {"name": "gaussian_noise", "scale": 0.3}


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def fit(path, out):
    """The baselines of a recipe, and what they predict of validation."""
    with open_workspace(recipes.load(path), path.parent / out, reporter=Reporter(silent=True)) as ws:
        labels = labels_of(ws)
        folder = fit_baselines(ws, labels, ws.feed("train", labels.y))
        return {file.stem: load_file(file) for file in folder.iterdir()}, predict_baselines(ws, folder, "val")


def test_noise_is_left_out_of_labels_only_and_has_a_baseline_of_its_own(recipe):
    plain, of_plain = fit(recipe(), "plain")
    assert plain.keys() == of_plain.keys() == {"labels-only", "pca-logistic"}
    noisy, of_noisy = fit(recipe({"model.regularizers": [{"name": "kl"}, NOISE]}), "noisy")
    assert noisy.keys() == of_noisy.keys() == {"labels-only", "labels-only-augmented", "pca-logistic"}
    assert same(noisy["labels-only"], plain["labels-only"])  # bit for bit: nothing of the noise is left
    assert same(noisy["pca-logistic"], plain["pca-logistic"])
    assert not same(noisy["labels-only-augmented"], plain["labels-only"])
    assert same(of_noisy | {"labels-only-augmented": 0}, of_plain | {"labels-only-augmented": 0})


def test_what_changes_every_sample_always_is_no_perturbation():
    """Colours that nobody ever sees, in training or after it, are not what augments."""
    gray = {"name": "grayscale"}
    names = {
        name: tuple(networks_of(resolved(shape=(3, 8, 8), model={"regularizers": regularizers})))
        for name, regularizers in {"gray": [gray], "noisy": [gray, NOISE]}.items()
    }
    assert names == {"gray": ("labels-only",), "noisy": ("labels-only", "labels-only-augmented")}
    kept = networks_of(resolved(shape=(3, 8, 8), model={"regularizers": [gray, NOISE]}))["labels-only"]
    assert [part.cls.name for part in kept.regularizers] == ["grayscale"]


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression"])
def test_a_weight_of_two_is_the_row_twice(task):
    random = np.random.default_rng(0)
    z, weight = random.normal(size=(61, 3)), random.integers(1, 4, 61)
    y = {
        "classes": random.integers(0, 3, 61),
        "multilabel": random.integers(0, 2, (61, 2)).astype(float),
        "regression": random.normal(size=(61, 2)),
    }[task]
    outputs = 3 if task == "classes" else 2
    ours = linear_model(z, y, weight.astype(float), outputs, task)
    theirs = linear_model(np.repeat(z, weight, 0), np.repeat(y, weight, 0), None, outputs, task)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)  # both stop at scikit-learn's tolerance, 1e-4 of the gradient


def test_rows_of_weight_0_are_as_good_as_unknown(digits, recipe):
    """Wrong labels that weigh nothing change no bit of the linear baseline."""
    train = DataSet.open(digits)
    y = train.labels("train")
    weight = np.where(np.arange(len(y)) < 100, 1.0, 0.0).astype(np.float32)
    unknown = np.where(weight > 0, y, -1)
    wrong = np.where(weight > 0, y, (y + 1) % 10)
    with open_workspace(recipes.load(recipe()), recipe().parent / "run", reporter=Reporter(silent=True)) as ws:
        components = fit_components(ws)
        few = fit_linear(ws, Labels(unknown, weight), components)
        assert same(
            {"weight": few["weight"].numpy()}, {"weight": fit_linear(ws, Labels(wrong, weight), components)["weight"].numpy()}
        )
        plain = fit_linear(ws, Labels(unknown, None), components)
        np.testing.assert_allclose(few["weight"], plain["weight"], atol=1e-3)


def test_components_are_scikit_learns(digits, recipe):
    with open_workspace(recipes.load(recipe()), recipe().parent / "run", reporter=Reporter(silent=True)) as ws:
        found = fit_components(ws)
        train = ws.data.split("train")
        x = scaled(ws, train.read(np.arange(train.rows)))
    stored = DataSet.open(digits).split("train").read(np.arange(train.rows))
    np.testing.assert_allclose(x, stored.reshape(len(x), -1) / 16, atol=1e-6)  # grey levels 0 to 16
    theirs = PCA(5, svd_solver="full").fit(x)
    codes = found.codes(x)
    assert codes.shape == (train.rows, 5)
    signs = np.sign((found.basis * theirs.components_).sum(1))
    np.testing.assert_allclose(codes * signs, theirs.transform(x), atol=1e-3)
    np.testing.assert_allclose(found.spread, codes.std(0, ddof=1), rtol=1e-3)
