"""A tiny recipe on a small real data set, and runs of it that tests copy rather than make again."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import call, with_fields, write_yaml

TINY = {
    "name": "tiny",
    "data": {"labels": {"per_class": 3}},
    "model": {
        "latent_dim": 5,
        "encoder": {"name": "mlp", "widths": [17], "posterior": "diag"},
        "decoder": {"name": "mlp", "likelihood": "bernoulli"},
        "regularizers": [{"name": "kl"}],
    },
    "pretrain": {"epochs": 2, "batch_size": 128},
    "finetune": {"epochs": 2, "batch_size": 128},
    "device": "cpu",
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_pictures() -> Iterator[Callable]:
    """Figures are composed but not rendered, one pixel is saved for each: rendering is most of what a short run does.

    Returns the method that renders, for `rendered`.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    with pytest.MonkeyPatch.context() as patch:
        render = Figure.savefig
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Image.new("L", (1, 1)).save(path, format="png"))
        yield render


@pytest.fixture
def rendered(quick_pictures, monkeypatch) -> None:
    """For tests that look at a picture."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", quick_pictures)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1,797 digits, packed: 1,298 train, 144 val, 355 test."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert call("data", "pack", "digits", folder).code == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder. Runs keep their journal for later, because delivering it to MLflow costs seconds a stage."""
    for name in os.environ:
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_AE_TRACKING", "journal")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here, digits):
    """Writes TINY with fields replaced: `recipe({"model.latent_dim": 3})`."""

    def write(fields: dict[str, object] | None = None, name: str = "recipe.yaml") -> Path:
        return write_yaml(here / name, with_fields(TINY, {"data.path": str(digits), **(fields or {})}))

    return write


@pytest.fixture
def data(here, digits) -> Path:
    """A copy of the data set that a test may damage."""
    return shutil.copytree(digits, here / "digits")


@pytest.fixture
def unlabelled(here) -> Path:
    """61 vectors of 7 numbers between -3 and 3 without labels."""
    x = np.random.default_rng(0).uniform(-3, 3, (61, 7)).astype(np.float32)
    np.savez(here / "x.npz", x=x)
    assert call("data", "pack", "x.npz", "vectors").code == 0
    return here / "vectors"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, digits) -> Path:
    """A run folder of TINY: pretrained, extracted, finetuned sequentially and jointly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_TRACKING", "journal")
        folder = tmp_path_factory.mktemp("finished")
        patch.chdir(folder)
        path = write_yaml(folder / "recipe.yaml", with_fields(TINY, {"data.path": str(digits)}))
        assert call("pretrain", path).code == 0
        assert call("extract", "runs/tiny").code == 0
        assert call("finetune", path).code == 0
        assert call("finetune", path, "--joint").code == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def finetuned(finished, here) -> Path:
    """A copy of `finished` as runs/tiny under the current folder."""
    return shutil.copytree(finished, here / "runs" / "tiny")


@pytest.fixture
def pretrained(finetuned) -> Path:
    """The same before it was finetuned and extracted."""
    for name in ("finetune", "baselines", "latents"):
        shutil.rmtree(finetuned / name)
    return finetuned


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The matplotlib figures saved during the test: what they say can be read off their objects, not off the pixels."""
    from matplotlib.figure import Figure  # takes a while to import, and few tests draw

    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: object, **options: object) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved
