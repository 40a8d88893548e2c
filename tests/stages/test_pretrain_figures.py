"""What pretraining draws: samples as the encoder sees them beside what it makes of them, and what the components show."""

import json
import sys

import numpy as np
import pytest
import torch
from command_line import call
from plugin_kit import put

from ssl_ae import figures
from ssl_ae.data.dataset import DataSet
from ssl_ae.model import frozen
from ssl_ae.progress import Reporter
from ssl_ae.stages.autoencoder import Autoencoder

NOISE = {"name": "masking_noise", "fraction": 0.5}
COLOURFUL = {
    "name": "colourful",
    "data.path": "photos",
    "data.labels": "all",
    "model.regularizers": [{"name": "grayscale"}],
    "model.latent_dim": 3,
    "model.decoder": {"name": "mlp", "likelihood": "gaussian"},
    "pretrain.epochs": 1,
}

SHOWING = '''
import torch
import ssl_ae

class Showing(ssl_ae.Regularizer):
    """Shows a picture twice under one name, one under a name that is taken, and then fails."""
    name = "showing"

    def perturb(self, h, layer):
        return h

    def pictures(self, trace):
        assert not torch.is_grad_enabled() and not trace.model.training
        assert trace.p_x is not None and trace.clean
        with torch.enable_grad():
            assert trace.encode(trace.batch.x.requires_grad_()).mean.requires_grad
        for name in ("rows", "rows", "reconstructions"):
            yield ssl_ae.Histogram(name, f"{len(trace.batch)} rows", trace.z.flatten(), "code")
        raise ZeroDivisionError("nothing to divide by")

@ssl_ae.hookimpl
def ssl_ae_regularizers():
    return [Showing]
'''


@pytest.fixture
def drawn(monkeypatch):
    """What the picture of reconstructions was given."""
    given, draw = [], figures.reconstructions

    def reconstructions(path, originals, rebuilt, kind, corrupted=None, peak=None):
        given.append((originals, rebuilt, corrupted, peak))
        return draw(path, originals, rebuilt, kind, corrupted, peak)

    monkeypatch.setattr(figures, "reconstructions", reconstructions)
    return given


@pytest.fixture
def photos(here):
    """23 colour images of 5 x 7."""
    x = np.random.default_rng(0).integers(0, 256, (23, 3, 5, 7), dtype=np.uint8)
    np.savez(here / "x.npz", x=x)
    assert call("data", "pack", "x.npz", "photos").code == 0
    return here / "photos"


def remade(run, x):
    """Stored samples through the trained model without noise, as stored."""
    made = Autoencoder.load(run, Reporter(silent=True))
    with frozen(made.model), torch.no_grad():
        return made.scaling.inverse(made.model.reconstruct(made.scaling(torch.from_numpy(x))).mean).numpy()


# --- reconstructions


def test_without_noise_there_is_nothing_corrupted_to_show(recipe, here, drawn, digits):
    assert call("pretrain", recipe()).code == 0
    ((originals, rebuilt, corrupted, peak),) = drawn
    val = DataSet.open(digits).split("val").read(np.linspace(0, 143, 10).round().astype(int))  # of 144
    np.testing.assert_array_equal(originals, val)
    assert corrupted is None
    assert peak == 16.0  # digits hold 0..16
    np.testing.assert_allclose(rebuilt, remade(here / "runs/tiny", val), atol=1e-4)


def test_a_denoiser_shows_the_noise_and_what_is_left_of_it(recipe, here, drawn):
    """Masking sets about half of the numbers to 0, and the reconstruction is of that; dropout of hidden units is off."""
    fields = {"model.regularizers": [NOISE, {"name": "dropout"}], "model.encoder": {"name": "mlp", "widths": [17]}}
    assert call("pretrain", recipe(fields)).code == 0
    ((originals, rebuilt, corrupted, _),) = drawn
    gone = corrupted != originals
    assert (corrupted[gone] == 0).all()
    assert 0.35 < gone[originals > 0].mean() < 0.65  # 3 standard errors of half of about 300 numbers: 0.09
    np.testing.assert_allclose(rebuilt, remade(here / "runs/tiny", corrupted), atol=1e-4)
    assert call("pretrain", recipe(fields), "--restart").code == 0
    np.testing.assert_array_equal(drawn[1][2], corrupted)  # the recipe's seed decides the noise


def test_noise_on_hidden_layers_corrupts_no_sample(recipe, here, drawn):
    fields = {"model.regularizers": [{"name": "dropout"}], "model.encoder": {"name": "mlp", "widths": [17]}}
    assert call("pretrain", recipe(fields)).code == 0
    assert drawn[0][2] is None


def test_colourisation_shows_grey_samples_and_colours_them(recipe, here, photos, drawn):
    assert call("pretrain", recipe(COLOURFUL)).code == 0
    ((originals, rebuilt, corrupted, peak),) = drawn
    assert (np.ptp(originals.astype(float), axis=1) > 0).any()
    np.testing.assert_allclose(np.ptp(corrupted, axis=1), 0, atol=1e-3)  # equal channels
    np.testing.assert_allclose(rebuilt, remade(here / "runs/colourful", originals), atol=1e-3)
    assert peak == 255.0


def test_what_always_happens_to_a_sample_happens_once(recipe, here, photos, drawn, monkeypatch):
    """Not every change of the input may be made twice: one that halves, say. The encoder of the figure sees x / 2."""
    from ssl_ae_builtins.grayscale import Grayscale

    seen = []
    monkeypatch.setattr(Grayscale, "perturb", lambda self, h, layer: seen.append(h) or h / 2)
    assert call("pretrain", recipe(COLOURFUL)).code == 0
    ((originals, rebuilt, corrupted, _),) = drawn
    np.testing.assert_allclose(corrupted, originals / 2, atol=1e-3)
    np.testing.assert_allclose(rebuilt, remade(here / "runs/colourful", originals), atol=1e-3)


def test_vectors_have_no_peak(recipe, here, unlabelled, drawn):
    fields = {"data.path": str(unlabelled), "data.labels": "all", "model.latent_dim": 2, "pretrain.epochs": 1}
    assert call("pretrain", recipe({**fields, "model.decoder": {"name": "mlp", "likelihood": "gaussian"}})).code == 0
    assert drawn[0][3] is None


# --- components


def test_a_picture_that_fails_costs_a_warning(recipe, here, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(folder)
    module = put(folder, "showing", SHOWING)
    try:
        answer = call("pretrain", recipe({"model.regularizers": [{"name": "kl"}, {"name": "showing"}]}), "--json")
    finally:
        sys.modules.pop(module, None)
    assert answer.json["status"] == "done"
    assert answer.json["warnings"] == [
        "regularizer showing/showing shows no picture of itself, or not all: ZeroDivisionError: nothing to divide by"
    ]
    stage = here / "runs" / "tiny" / "pretrain"
    names = {path.name for path in (stage / "figures").iterdir()}
    assert names >= {"rows.png", "rows-2.png", "reconstructions.png", "reconstructions-2.png", "filters.png"}
    journal = [json.loads(line) for line in (stage / "journal" / "rank-0.jsonl").read_text().splitlines()]
    logged = {event["path"].split("/")[-1] for event in journal if event["event"] == "artifact" and event["folder"] == "figures"}
    assert logged == names
    assert call("extract", "runs/tiny", "--split", "val").code == 0
