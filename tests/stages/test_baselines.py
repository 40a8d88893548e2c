"""Baselines: labels alone, without and with the recipe's perturbations; PCA as scikit-learn has it."""

import numpy as np
from engine_kit import resolved
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from ssl_ae import recipe as recipes
from ssl_ae.data.dataset import DataSet
from ssl_ae.progress import Reporter
from ssl_ae.stages.baselines import fit_baselines, fit_components, networks_of, predict_baselines, scaled
from ssl_ae.stages.labels import labels_of
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
