"""sample: which codes are decoded, in whose units, and what is refused."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from command_line import call, one_line, with_fields, write_yaml
from conftest import TINY
from PIL import Image
from scipy import stats
from ssl_ae_builtins.mlp import MlpDecoder

from ssl_ae import latents, tables
from ssl_ae.data.dataset import DataSet
from ssl_ae.model import frozen
from ssl_ae.progress import Reporter
from ssl_ae.stages import sample as stage
from ssl_ae.stages.autoencoder import Autoencoder

pytestmark = pytest.mark.usefixtures("rendered")
POINT = {"model.encoder.posterior": "point", "model.regularizers": []}
BITS = {"model.encoder": {"name": "hash", "widths": [17], "sampling": "gumbel"}, "model.latent_dim": 2}
ENCODERS = {"bits": BITS, "point": POINT, "flat-point": {**POINT, "model.latent_dim": 2}, "flat": {"model.latent_dim": 2}}


def sampled(run, *words):
    """The decoded samples and the answer of `sample`, whose picture must be one."""
    answer = call("sample", run, *words, "--out", "sheet.png", "--npy", "sheet.npy", "--json")
    assert answer.code == 0, answer.stderr
    with Image.open("sheet.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    assert answer.json["outputs"] == {"picture": "sheet.png", "samples": "sheet.npy"}
    x = np.load("sheet.npy")
    assert answer.json["metrics"] == {"samples": float(len(x))}
    assert np.isfinite(x).all()
    return x, answer


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Run folders of the tiny recipe with another encoder, pretrained for an epoch: `trained("point")`, made once."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def train(name):
        if name not in made:
            fields = {"data.path": str(digits), "pretrain.epochs": 1, "name": name, **ENCODERS[name]}
            path = write_yaml(folder / f"{name}.yaml", with_fields(TINY, fields))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SSL_AE_TRACKING", "journal")
                answer = call("pretrain", path, "--out", folder / name)
            assert answer.code == 0, answer.stderr
            made[name] = folder / name
        return made[name]

    return train


def by_hand(run, z):
    """Means of p(x|z) on the digits' scale, 0 to 16."""
    made = Autoencoder.load(run, Reporter(silent=True))
    with frozen(made.model), torch.no_grad():
        return 16 * made.model.decode(torch.as_tensor(np.array(z), dtype=torch.float32)).mean.numpy()


def codes_of(run, x):
    made = Autoencoder.load(run, Reporter(silent=True))
    with frozen(made.model), torch.no_grad():
        return made.model.features(torch.from_numpy(x).float() / 16).numpy()


# --- from a prior


def test_samples_of_the_prior(finetuned):
    x, answer = sampled(finetuned)
    assert x.shape == (64, 1, 8, 8)
    assert x.dtype == np.float32
    assert 0 <= x.min() < 8 < x.max() <= 16  # the digits' own units
    assert answer.json["source"] == "prior"
    assert answer.json["prior"] == "normal"
    assert answer.json["warnings"] == []


def test_a_seed_decides_the_draws(finetuned):
    first, again, other = (sampled(finetuned, "--n", 3, "--seed", seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(first, sampled(finetuned, "--n", 3)[0])  # 0 is the default


def studio(run):
    return stage.Studio(run, Autoencoder.load(run, Reporter(silent=True)), Reporter(silent=True), None)


def test_the_prior_is_standard_normal(finetuned):
    z = stage.from_own_prior(studio(finetuned), 5_000, seed=3)
    assert z.shape == (5_000, 5)
    assert stats.kstest(z.ravel(), "norm").pvalue > 0.01
    np.testing.assert_allclose(np.cov(z.T), np.eye(5), atol=5 * (2 / 5_000) ** 0.5)  # 5 standard errors of a variance


def test_drawing_leaves_the_generator_alone(finetuned):
    made = studio(finetuned)
    before = torch.get_rng_state()
    stage.from_own_prior(made, 3, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_prior_needs_no_data(recipe, data, here):
    path = recipe({"data.path": str(data), "pretrain.epochs": 1})
    assert call("pretrain", path).code == 0
    shutil.rmtree(data)
    assert call("sample", "runs/tiny", "--out", "s.png").code == 0
    assert call("sample", "runs/tiny", "--prior", "mixture", "--out", "s.png").code == 2


class Opened(stage.Studio):
    """One whose stored codes are given."""

    def stored_codes(self):
        return self.run

    @property
    def train_rows(self):
        return len(self.run)


def mixture_of(z, count, components=None, seed=0):
    return stage.from_mixture(Opened(z, None, Reporter(silent=True), None), count, components, seed)[0]


def test_a_mixture_of_one_is_the_gaussian_of_the_codes():
    """Maximum likelihood of one Gaussian is the codes' mean and covariance; 5 standard errors of 20,000 draws and the ridge."""
    random = np.random.default_rng(0)
    z = (random.normal(size=(499, 3)) @ random.normal(size=(3, 3)) + [5, 0, -2]).astype(np.float32)
    drawn = mixture_of(z, 20_000, 1)
    std = z.std(0)
    assert (np.abs(drawn.mean(0) - z.mean(0)) < 5 * std / 20_000**0.5).all()
    spread = np.outer(std, std)
    assert (np.abs(np.cov(drawn.T) - np.cov(z.T)) < 5 * (2 / 20_000) ** 0.5 * spread + 2 * stage.RIDGE * z.var()).all()


def test_a_mixture_finds_clusters_and_mixes_them():
    """Three far clusters of 2, 3 and 5 parts: draws fall into them in these parts, and not one after another."""
    random = np.random.default_rng(0)
    centres, which = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]]), random.permutation(np.repeat([0, 1, 2], [200, 300, 500]))
    z = centres[which] + random.normal(size=(1000, 2))
    drawn = mixture_of(z.astype(np.float32), 10_000, 3)
    nearest = np.linalg.norm(drawn[:, None] - centres, axis=2).argmin(1)
    assert np.bincount(nearest) / 10_000 == pytest.approx([0.2, 0.3, 0.5], abs=0.025)
    assert (np.diff(nearest) != 0).mean() > 0.5
    assert np.linalg.norm(drawn - centres[nearest], axis=1).max() < 8


def test_a_mixture_of_codes_that_hardly_vary():
    """A dimension that is always 0, as of a unit that died, and fewer codes than Gaussians by default."""
    z = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32) * [1, 0, 1]
    drawn = mixture_of(z, 100)
    assert np.isfinite(drawn).all()
    assert np.abs(drawn[:, 1]).max() < 0.5


def test_a_deterministic_encoder_is_drawn_from_a_mixture_aloud(trained, here):
    run = shutil.copytree(trained("point"), here / "run", ignore=shutil.ignore_patterns("latents"))
    x, answer = sampled(run, "--n", 7)
    assert x.shape == (7, 1, 8, 8)
    assert (answer.json["prior"], answer.json["components"]) == ("mixture", 10)
    assert answer.json["warnings"] == []
    assert "the encoder is deterministic" in answer.stderr
    assert "fitting a mixture of 10 Gaussians to 1,298 codes of train" in answer.stderr
    assert "extract: 1,298 rows of train" in answer.stderr  # first, because nothing had been extracted
    again, _ = sampled(run, "--n", 7, "--prior", "mixture", "--components", 3, "--seed", 0)
    assert not np.array_equal(x, again)


def test_its_prior_is_done_as_asked_and_warned_of(trained, here):
    run = shutil.copytree(trained("point"), here / "run", ignore=shutil.ignore_patterns("latents"))
    _, answer = sampled(run, "--prior", "normal", "--n", 3)
    (warning,) = answer.json["warnings"]
    assert warning.endswith("says little. Take --prior mixture.")
    assert answer.json["prior"] == "normal"
    assert not (run / "latents").exists()


def test_a_random_encoder_may_be_drawn_from_a_mixture_too(finetuned):
    x, answer = sampled(finetuned, "--components", 2, "--n", 5)
    assert (answer.json["prior"], answer.json["components"], len(x)) == ("mixture", 2, 5)


def test_the_prior_of_bits_is_uniform(trained, here):
    run = trained("bits")
    z = stage.from_own_prior(studio(run), 5_000, seed=0)
    assert set(np.unique(z)) == {0.0, 1.0}
    assert np.abs(z.mean(0) - 0.5).max() < 5 * 0.5 / 5_000**0.5
    _, answer = sampled(run, "--n", 3)
    assert (answer.json["prior"], answer.json["warnings"]) == ("uniform", [])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prior", "normal"], "--prior normal"),
        (["--components", 3], "--prior mixture"),
        (["--grid"], "--grid"),
        (["--traverse", 1], "--traverse"),
    ],
)
def test_bits_have_no_values_between_them(trained, here, words, named):
    message = one_line("sample", trained("bits"), *words, "--out", "s.png")
    assert message.startswith(f"{named}: the codes of ")
    assert "are symbols, wh" in message
    assert message.endswith(f"Leave {named} out.")


# --- the plane


def test_the_plane_is_at_quantiles_of_the_prior(trained, here):
    flat = trained("flat")
    x, answer = sampled(flat, "--grid", "--n", 4)
    quantiles = stats.norm.ppf([0.125, 0.375, 0.625, 0.875])
    z = [[across, up] for up in quantiles[::-1] for across in quantiles]  # rows from the top, as a map
    np.testing.assert_allclose(x, by_hand(flat, z), atol=1e-3)
    assert answer.json["source"] == "grid"


def test_the_plane_of_a_deterministic_encoder_spans_its_codes(trained, here):
    run = trained("flat-point")
    x, _ = sampled(run, "--grid", "--n", 3)
    low, high = np.percentile(latents.read(run / "latents" / "train").z, [1, 99], axis=0)
    z = [[across, up] for up in np.linspace(high[1], low[1], 3) for across in np.linspace(low[0], high[0], 3)]
    np.testing.assert_allclose(x, by_hand(run, z), atol=1e-3)


# --- one dimension


def test_a_dimension_of_validation_samples(finetuned, digits):
    x, answer = sampled(finetuned, "--traverse", 2, "--n", 3)
    val = DataSet.open(digits).split("val").read(np.arange(3))
    z = codes_of(finetuned, val)[:, None].repeat(11, axis=1)
    z[:, :, 1] = np.linspace(-3, 3, 11)  # of the prior, whose standard deviation is 1
    np.testing.assert_allclose(x, by_hand(finetuned, z.reshape(-1, 5)), atol=1e-3)
    assert answer.json["source"] == "traverse"


def test_a_dimension_of_a_deterministic_encoder(trained, digits, here):
    run = trained("point")
    x, _ = sampled(run, "--traverse", 5)
    stored = latents.read(run / "latents" / "train").z[:, 4]
    z = codes_of(run, DataSet.open(digits).split("val").read(np.arange(6)))[:, None].repeat(11, axis=1)
    z[:, :, 4] = stored.mean() + np.linspace(-3, 3, 11) * stored.std()
    np.testing.assert_allclose(x, by_hand(run, z.reshape(-1, 5)), atol=1e-3)


# --- between two samples


def test_the_way_between_samples_of_any_split(finetuned, digits):
    data = DataSet.open(digits)
    keys = [data.split(split).keys[5] for split in ("test", "train")]
    x, answer = sampled(finetuned, "--interpolate", *keys, "--n", 5)
    first, last = (codes_of(finetuned, data.split(split).read(np.array([5])))[0] for split in ("test", "train"))
    z = [(1 - t) * first + t * last for t in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(x, by_hand(finetuned, z), atol=1e-3)
    assert answer.json["source"] == "interpolate"


# --- codes of one's own


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_codes_of_a_file(finetuned, here, kind):
    z = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    if kind == "parquet":
        tables.write_parquet(here / "z.parquet", {"key": list("abcdefg"), "latent": z})
    else:
        np.save(here / "z.npy", z.astype(np.float64))
    x, answer = sampled(finetuned, "--codes", f"z.{kind}")
    np.testing.assert_allclose(x, by_hand(finetuned, z), atol=1e-3)
    assert answer.json["source"] == "codes"


# --- other kinds of data


def test_vectors_come_back_in_their_own_units(recipe, unlabelled, here):
    fields = {"data.path": str(unlabelled), "data.labels": "all", "model.decoder.likelihood": "gaussian", "name": "vectors"}
    path = recipe({**fields, "model.latent_dim": 2, "pretrain.epochs": 1})
    assert call("pretrain", path).code == 0
    run = here / "runs" / "vectors"
    for words in (["--n", 11], ["--grid", "--n", 3], ["--traverse", 1], ["--interpolate", "x-00000000", "x-00000001"]):
        if words[0] == "--interpolate":
            keys = DataSet.open(unlabelled).split("train").keys
            words = ["--interpolate", keys[0], keys[1]]
        x, _ = sampled(run, *words)
        assert x.shape[1:] == (7,)
    np.save(here / "z.npy", np.zeros((1, 2)))
    x, _ = sampled(run, "--codes", "z.npy")
    made = Autoencoder.load(run, Reporter(silent=True))
    card = made.resolved.card.x
    with frozen(made.model), torch.no_grad():
        mean = made.model.decode(torch.zeros(1, 2)).mean.numpy()
    np.testing.assert_allclose(x, mean * card.std + card.mean, rtol=1e-4, atol=1e-5)  # standardised by feature


def test_signals(recipe, here):
    (here / "signals").mkdir()
    with tarfile.open(here / "signals" / "train-0.tar", "w") as tar:
        for i, sample in enumerate(np.random.default_rng(0).normal(size=(61, 2, 13)).astype(np.float32)):
            content = io.BytesIO()
            np.save(content, sample)
            info = tarfile.TarInfo(f"{i:02d}.npy")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
    fields = {"data.path": "signals", "data.labels": "all", "data.scale": "none", "model.decoder.likelihood": "gaussian"}
    assert call("pretrain", recipe({**fields, "pretrain.epochs": 1})).code == 0
    assert sampled(here / "runs" / "tiny", "--n", 3)[0].shape == (3, 2, 13)


# --- refusals


EXCLUDED = {
    "--grid and --traverse": ["--grid", "--traverse", 1],
    "--grid and --interpolate and --codes": ["--grid", "--interpolate", "a", "b", "--codes", "z.npy"],
    "--prior mixture: has no effect with --grid": ["--grid", "--prior", "mixture"],
    "--seed 3: has no effect with --traverse": ["--traverse", 1, "--seed", 3],
    "--components 3: has no effect with --codes": ["--codes", "z.npy", "--components", 3],
    "--components 3: of a mixture. Take --prior mixture": ["--prior", "normal", "--components", 3],
    "--n 5: has no effect with --codes": ["--codes", "z.npy", "--n", 5],
    "--n 1: a way between two codes": ["--interpolate", "a", "b", "--n", 1],
    "--grid: shows a code of two dimensions, that of runs/tiny has 5. Take --traverse DIM": ["--grid"],
    "--traverse 6: the code of runs/tiny has the dimensions 1 to 5.": ["--traverse", 6],
    "--traverse 0: the code of runs/tiny has the dimensions 1 to 5.": ["--traverse", 0],
    "--interpolate digits-x: no sample of": ["--interpolate", "digits-x", "digits-00000000"],
    "nowhere.npy does not exist.": ["--codes", "nowhere.npy"],
    "--codes z.csv: expected a .parquet file": ["--codes", "z.csv"],
    "--components 2000: there are 1,298 codes to fit them to": ["--components", 2000],
}


@pytest.mark.parametrize("message", EXCLUDED)
def test_what_cannot_be_is_refused(finetuned, message):
    assert one_line("sample", "runs/tiny", *EXCLUDED[message], "--out", "s.png").startswith(message)


@pytest.mark.parametrize(("option", "name", "suffix"), [("--out", "s.jpg", ".png"), ("--npy", "s.npz", ".npy")])
def test_files_of_another_kind(finetuned, option, name, suffix):
    words = {"--out": "s.png", option: name}
    message = one_line("sample", "runs/tiny", *(word for pair in words.items() for word in pair))
    assert message.startswith(f"{option} {name}: the ")
    assert message.endswith(f"; give a name that ends in {suffix}.")


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((3, 4)), "holds float64 (3, 4): expected at least one code of 5 numbers, (N, 5)."),
        (np.zeros(5), "holds float64 (5,)"),
        (np.zeros((0, 5)), "holds float64 (0, 5)"),
        (np.array([["a"] * 5]), "holds <U1 (1, 5)"),
        (np.full((2, 5), np.nan), "holds numbers that are not finite."),
    ],
)
def test_codes_that_are_none(finetuned, here, z, message):
    np.save(here / "z.npy", z)
    assert one_line("sample", "runs/tiny", "--codes", "z.npy", "--out", "s.png").startswith(f"z.npy {message}")


def test_codes_that_would_run_code(finetuned, here):
    np.save(here / "z.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert one_line("sample", "runs/tiny", "--codes", "z.npy", "--out", "s.png").startswith("z.npy cannot be read: ")


def test_a_table_without_codes(finetuned, here):
    tables.write_parquet(here / "z.parquet", {"latents": np.zeros((3, 5))})
    message = one_line("sample", "runs/tiny", "--codes", "z.parquet", "--out", "s.png")
    assert message == "z.parquet has no column 'latent'; it has latents. Did you mean latents?"


def test_codes_of_several_lengths(finetuned, here):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"latent": [[1.0, 2.0], [3.0]]}), here / "z.parquet")
    assert "expected at least one code of 5 numbers" in one_line("sample", "runs/tiny", "--codes", "z.parquet", "--out", "s.png")


def test_a_decoder_that_reads_the_encoder_is_refused_at_once(finetuned, monkeypatch):
    monkeypatch.setattr(MlpDecoder, "reads_layers", True)
    message = one_line("sample", "runs/tiny", "--prior", "mixture", "--out", "s.png")
    assert message.startswith("runs/tiny decodes no code of its own: its decoder builtins/mlp reads the layers of the encoder")


def test_a_run_that_is_not_pretrained(here):
    assert "is no run folder" in one_line("sample", "nowhere", "--out", "s.png")
