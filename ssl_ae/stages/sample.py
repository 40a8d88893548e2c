"""sample: a picture of what a pretrained model decodes: codes from a prior, of a plane, of one dimension, of a way, of a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from ssl_ae import files, latents, tables
from ssl_ae.errors import DataError, RecipeError
from ssl_ae.latent import prior_of
from ssl_ae.progress import Reporter
from ssl_ae.randomness import seed_draws
from ssl_ae.runs import RECIPE
from ssl_ae.stages.autoencoder import Autoencoder
from ssl_ae.stages.extract import extract
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.stored import recipe_of
from ssl_ae.stages.workspace import Workspace, open_workspace
from ssl_ae.trace import Batch, Need

Prior = Literal["normal", "mixture"]

SAMPLES, SIDE, ROWS, POINTS = 64, 20, 6, 10  # what --n stands for: samples, values a side, samples traversed, codes of a way
REACH = np.linspace(-3, 3, 11)  # standard deviations that a traversal goes through
MIDDLE = (1, 99)  # percentiles of stored codes that a plane spans: an outlier would take most of it
COMPONENTS = 10
FITTED_ROWS = 20_000  # of the train split, drawn at random, to which a mixture is fitted
RIDGE = 1e-3  # added to the variances of a component, as a part of the codes' own: full covariances of few rows are singular
BATCH_ROWS = 1024
UNDRAWN = "the encoder is deterministic, so nothing drew its codes to N(0, I)"


@dataclass(frozen=True)
class Asked:
    """The options of the command. Raises RecipeError where two of them exclude each other."""

    n: int | None = None
    prior: Prior | None = None
    components: int | None = None
    grid: bool = False
    traverse: int | None = None  # from 1: z1 is the first dimension, as figures write it
    interpolate: tuple[str, str] | None = None
    codes: Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        chosen = self.chosen
        if len(chosen) > 1:
            raise RecipeError(f"--{' and --'.join(chosen)}: choose one at a time.")
        for name in ("prior", "components", "seed") if chosen else ():
            if getattr(self, name) is not None:
                raise RecipeError(
                    f"--{name} {getattr(self, name)}: has no effect with --{chosen[0]}, whose codes are not drawn. Leave one out."
                )
        if self.components is not None and self.prior == "normal":
            raise RecipeError(f"--components {self.components}: of a mixture. Take --prior mixture, or leave it out.")
        if self.n is not None and self.codes is not None:
            raise RecipeError(f"--n {self.n}: has no effect with --codes, every code of which is decoded. Leave it out.")
        if self.n == 1 and self.interpolate is not None:
            raise RecipeError("--n 1: a way between two codes has at least its two ends. Take --n 2 or more.")

    @property
    def chosen(self) -> list[str]:
        """The options given that say where codes come from."""
        given = {"grid": self.grid or None, "traverse": self.traverse, "interpolate": self.interpolate, "codes": self.codes}
        return [name for name, value in given.items() if value is not None]


@dataclass
class Studio:
    """What sheets are made with: the model, and the data where a sheet needs them."""

    run: Path
    made: Autoencoder
    reporter: Reporter
    _opened: contextlib.ExitStack

    @cached_property
    def ws(self) -> Workspace:
        """The run with its data, claimed until the sheet is made; a prior that needs neither works without them."""
        recipe = recipe_of(self.run, Reporter(silent=True))  # what it has to say has been said
        return self._opened.enter_context(open_workspace(recipe, self.run, str(self.run / RECIPE), self.reporter))

    @property
    def posterior(self) -> str:
        """The kind of q(z|x)."""
        encoder = self.made.resolved.encoder
        return encoder.cls.posterior(encoder.config)

    @property
    def symbols(self) -> bool:
        """Whether codes are discrete."""
        return self.posterior in ("bernoulli", "categorical")

    @property
    def latent(self) -> int:
        return self.made.resolved.shapes.latent

    def refuse_symbols(self, option: str, why: str) -> None:
        if self.symbols:
            raise RecipeError(f"{option}: the codes of {self.run} are symbols, {why}. Leave {option} out.")

    @property
    def train_rows(self) -> int:
        return self.ws.card.split("train").rows

    def refuse_features(self) -> None:
        """Raises RecipeError where what is stored of a sample is what a head reads, and the decoder reads something else."""
        encoder = self.made.resolved.encoder
        if encoder.cls.conditional:
            raise RecipeError(
                f"encoder {encoder.full_name}: a sample's features, which tell its label, are no code that its decoder reads. "
                "Draw from the model's own prior: leave --prior mixture, --traverse and --interpolate out."
            )

    def stored_codes(self) -> np.ndarray:
        """(N, K) codes of the train split, extracted first where they are missing."""
        self.refuse_features()
        extract(self.ws, ["train", "val"])  # both, because the map of the latents is one of val
        return latents.read(self.ws.run / "latents" / "train").z

    def codes_of(self, stored: np.ndarray) -> np.ndarray:
        """E[z|x] of samples as they are stored, (n, *shape) -> (n, K)."""
        self.refuse_features()
        x = self.made.scaling(torch.from_numpy(stored).to(self.made.device))
        return self.made.model.features(x).float().cpu().numpy()

    def decode(self, z: np.ndarray) -> np.ndarray:
        """E[x|z], (N, *shape) float32, in the units in which samples are stored."""
        codes = torch.from_numpy(np.array(z, dtype=np.float32)).to(self.made.device)
        means = (self.made.model.decode(part).mean for part in codes.split(BATCH_ROWS))
        return np.concatenate([self.made.scaling.inverse(mean).float().cpu().numpy() for mean in means])


@dataclass(frozen=True)
class Sheet:
    """Codes to decode, and how what they decode to is drawn."""

    z: np.ndarray  # (N, K)
    draw: Callable[..., Path]  # draw(path, decoded (N, *shape), kind=..., limits=...)
    more: dict[str, Any]  # what the answer says of the codes


def sample(run: Path, asked: Asked, out: Path, npy: Path | None = None, reporter: Reporter | None = None) -> Outcome:
    """Decode codes by the pretrained model, draw the means of p(x|z) into `out`, and keep them in `npy` where it is named."""
    reporter = reporter or Reporter()
    check_files(out, npy)
    made = Autoencoder.load(run, reporter)
    decoder = made.resolved.decoder
    if decoder.cls.reads_layers:
        raise RecipeError(
            f"{run} decodes no code of its own: its decoder {decoder.full_name} reads the layers of the encoder too. "
            "Take `ssl-ae reconstruct`, or pretrain with another decoder."
        )
    with contextlib.ExitStack() as opened, torch.inference_mode():
        studio = Studio(run, made, reporter, opened)
        source = next(iter(asked.chosen), "prior")
        sheet = SHEETS[source](studio, asked)
        decoded = studio.decode(sheet.z)
        x = made.resolved.card.x
        sheet.draw(out, decoded, kind=x.kind, limits=x.range if np.isfinite(x.range).all() else None)
    outputs = {"picture": out}
    if npy is not None:
        with files.whole_file(npy) as aside, open(aside, "wb") as file:
            np.save(file, decoded)
        outputs["samples"] = npy
    return Outcome(
        "sample",
        run,
        outputs=outputs,
        metrics={"samples": float(len(decoded))},
        warnings=list(reporter.warnings),
        more={"source": source, "prior": None, "components": None, **sheet.more},
    )


def check_files(out: Path, npy: Path | None) -> None:
    """Raises RecipeError for names that say another kind of file."""
    files.check_name("--out", out, ".png", "the picture is a PNG file")
    if npy is not None:
        files.check_name("--npy", npy, ".npy", "the samples are an array of numpy's")


# --- where codes come from


def from_prior(studio: Studio, asked: Asked) -> Sheet:
    """Drawn from the prior, or from a mixture of Gaussians fitted to the codes of the train split."""
    from ssl_ae import figures

    count, seed, certain = asked.n or SAMPLES, asked.seed or 0, studio.posterior == "point"
    prior = asked.prior or ("mixture" if asked.components else None)
    if prior is not None:
        studio.refuse_symbols(f"--prior {prior}", "whose prior is uniform")
    if prior is None and certain:
        prior = "mixture"
        studio.reporter.say(f"{UNDRAWN}: they are drawn from --prior mixture, fitted to the stored codes")
    elif prior == "normal" and certain:
        studio.reporter.warn(f"{UNDRAWN}, and what a code from there decodes to says little. Take --prior mixture.")
    if prior == "mixture":
        z, components = from_mixture(studio, count, asked.components, seed)
        source, more = f"a mixture of {components} Gaussians fitted to the codes", {"prior": prior, "components": components}
    else:
        z = from_own_prior(studio, count, seed)
        source, more = (
            ("the uniform prior", {"prior": "uniform"}) if studio.symbols else ("the prior N(0, I)", {"prior": "normal"})
        )

    def draw(path: Path, x: np.ndarray, **look: Any) -> Path:
        return figures.sample_sheet(
            path, x, title=f"Samples from {source}", detail=f"{studio.run.name}; mean of p(x|z); seed {seed}", **look
        )

    return Sheet(z, draw, more)


def from_own_prior(studio: Studio, count: int, seed: int) -> np.ndarray:
    """(count, K) draws from p(z): N(0, I), or uniform over symbols."""
    made = studio.made
    with torch.random.fork_rng(devices=[made.device.index or 0] if made.device.type == "cuda" else []):
        row = Batch(torch.zeros(1, *made.resolved.shapes.x, device=made.device))
        q = made.model(row, frozenset({Need.RECONSTRUCTION})).q  # of any row, and under any label: its kind alone matters
        seed_draws(seed, made.device)
        return prior_of(q).sample(torch.Size([count])).reshape(count, -1).cpu().numpy()


def from_mixture(studio: Studio, count: int, components: int | None, seed: int) -> tuple[np.ndarray, int]:
    """(count, K) draws from a mixture of Gaussians of full covariance, fitted to stored codes of train; and how many Gaussians.

    A density estimated after training is what makes a deterministic autoencoder generate (Ghosh et al. 2020, sec. 4).
    """
    rows = min(studio.train_rows, FITTED_ROWS)
    if components is not None and components > rows:
        raise RecipeError(f"--components {components}: there are {rows:,} codes to fit them to. Ask for fewer.")
    components = components or min(COMPONENTS, rows)
    z, random = studio.stored_codes(), np.random.default_rng(seed)
    chosen = z[random.permutation(len(z))[:rows]].astype(np.float64)
    studio.reporter.say(f"fitting a mixture of {components} Gaussians to {len(chosen):,} codes of train")
    ridge = RIDGE * max(float(chosen.var(axis=0).mean()), np.finfo(np.float32).tiny)
    mixture = GaussianMixture(components, reg_covar=ridge, max_iter=200, random_state=seed).fit(chosen)
    if not mixture.converged_:
        studio.reporter.warn(f"the mixture had not converged after {mixture.n_iter_} steps; fewer --components may fit better.")
    drawn, _ = mixture.sample(count)
    return random.permutation(drawn), components  # scikit-learn returns them one component after another


def from_plane(studio: Studio, asked: Asked) -> Sheet:
    """All of a two-dimensional code: quantiles of N(0, I), or the range of the stored codes of a deterministic encoder."""
    from ssl_ae import figures

    side = asked.n or SIDE
    studio.refuse_symbols("--grid", "which have no values between them")
    if studio.latent != 2:
        raise RecipeError(
            f"--grid: shows a code of two dimensions, that of {studio.run} has {studio.latent}. Take --traverse DIM, "
            "or pretrain with model.latent_dim: 2."
        )
    if studio.posterior == "point":
        low, high = np.percentile(studio.stored_codes(), MIDDLE, axis=0)
        across, up = (np.linspace(low[d], high[d], side) for d in (0, 1))
        detail = f"evenly between percentiles {MIDDLE[0]} and {MIDDLE[1]} of the stored codes"
    else:
        across = up = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side).numpy()
        detail = "at evenly spaced quantiles of the prior N(0, I): each cell is as likely as any other"
    up = up[::-1]

    def draw(path: Path, x: np.ndarray, **look: Any) -> Path:
        cells = x.reshape(side, side, *x.shape[1:])
        return figures.latent_plane(path, cells, across=across, up=up, title="The plane of codes, decoded", detail=detail, **look)

    return Sheet(np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2), draw, {})


def from_dimension(studio: Studio, asked: Asked) -> Sheet:
    """Codes of a few validation samples with one dimension set to each of a row of values."""
    from ssl_ae import figures

    dimension, random = asked.traverse, studio.posterior != "point"
    studio.refuse_symbols("--traverse", "which have no values between them")
    if not 1 <= dimension <= studio.latent:
        raise RecipeError(f"--traverse {dimension}: the code of {studio.run} has the dimensions 1 to {studio.latent}.")
    split = studio.ws.data.split("val")
    split = split if split.rows else studio.ws.data.split("train")
    rows = np.arange(min(asked.n or ROWS, split.rows))
    stored = None if random else studio.stored_codes()[:, dimension - 1]
    values = REACH if random else stored.mean() + REACH * stored.std()
    if not np.ptp(values):
        studio.reporter.warn(f"z{dimension} is {values[0]:.3g} in every stored code: there is nothing to traverse.")
    z = studio.codes_of(split.read(rows))[:, None].repeat(len(values), axis=1)  # (rows, values, K)
    z[:, :, dimension - 1] = values
    across = figures.numbered(REACH, f"z{dimension}, in standard deviations of the {'prior' if random else 'stored codes'}")
    samples = figures.Side([str(key) for key in split.keys[rows]])
    title, detail = (
        f"Dimension {dimension} of the code, traversed",
        f"{studio.run.name}; the rest of each code is the sample's own",
    )

    def draw(path: Path, x: np.ndarray, **look: Any) -> Path:
        cells = x.reshape(len(rows), len(values), *x.shape[1:])
        return figures.latent_traversal(path, cells, values=across, samples=samples, title=title, detail=detail, **look)

    return Sheet(z.reshape(-1, studio.latent), draw, {})


def from_pair(studio: Studio, asked: Asked) -> Sheet:
    """The codes of two samples and evenly spaced points of the straight line between them."""
    from ssl_ae import figures

    ends = np.concatenate([stored_sample(studio, key) for key in asked.interpolate])
    first, last = studio.codes_of(ends)
    parts = np.linspace(0, 1, asked.n or POINTS)[:, None]

    def draw(path: Path, x: np.ndarray, **look: Any) -> Path:
        return figures.latent_interpolation(path, x, ends, asked.interpolate, title="From one code to another", **look)

    return Sheet((1 - parts) * first + parts * last, draw, {})


def stored_sample(studio: Studio, key: str) -> np.ndarray:
    """(1, *shape) the sample with this key, whichever split has it. Raises DataError."""
    data = studio.ws.data
    for name in data.card.splits:
        found = np.flatnonzero(data.split(name).keys == key)
        if len(found):
            return data.split(name).read(found[:1])
    raise DataError(
        f"--interpolate {key}: no sample of {data.path} has this key. Its keys are such as {data.split('train').keys[0]}."
    )


def from_file(studio: Studio, asked: Asked) -> Sheet:
    """The codes of a Parquet or numpy file."""
    from ssl_ae import figures

    z, title = read_codes(asked.codes, studio.latent), f"Codes of {asked.codes.name}, decoded"

    def draw(path: Path, x: np.ndarray, **look: Any) -> Path:
        return figures.sample_sheet(path, x, title=title, detail=f"{studio.run.name}; mean of p(x|z)", **look)

    return Sheet(z, draw, {})


def read_codes(path: Path, latent: int) -> np.ndarray:
    """(N, K) finite numbers: column `latent` of a Parquet file, or a .npy file. Raises DataError."""
    if path.suffix == ".parquet":
        z = tables.read_parquet(path, ["latent"])["latent"]
    elif path.suffix == ".npy":
        try:
            z = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist.") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Write it with numpy.save.") from error
    else:
        raise DataError(f"--codes {path}: expected a .parquet file with the column latent, or a .npy file.")
    if z.ndim != 2 or z.shape[1] != latent or not len(z) or z.dtype.kind not in "fiu":
        raise DataError(f"{path} holds {z.dtype} {z.shape}: expected at least one code of {latent} numbers, (N, {latent}).")
    if not np.isfinite(z).all():
        raise DataError(f"{path} holds numbers that are not finite.")
    return z


SHEETS = {
    "prior": from_prior,
    "grid": from_plane,
    "traverse": from_dimension,
    "interpolate": from_pair,
    "codes": from_file,
}
