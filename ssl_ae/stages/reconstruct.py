"""reconstruct: samples as the decoder gives them back, cleaned of noise or completed, as a data set of their own."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_ae import bounds, files, tables
from ssl_ae.data import card as cards
from ssl_ae.data.card import Card, Split, X
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import LabelTable
from ssl_ae.data.moments import Moments, described
from ssl_ae.data.shards import ShardWriter
from ssl_ae.data.sources import PackOptions
from ssl_ae.errors import DataError, RecipeError
from ssl_ae.model import frozen
from ssl_ae.progress import Reporter
from ssl_ae.randomness import seed_draws, seed_of
from ssl_ae.stages.autoencoder import Autoencoder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import features_for, open_any
from ssl_ae.stages.scoring import BATCH_ROWS
from ssl_ae.trace import known, matches

SCORES, PICTURE, IMAGES = "scores.parquet", "reconstructions.png", "images"
BLOCK_ROWS = 16_384  # rows read at once
SHOWN = 10  # samples in the picture, evenly spaced
PNG_CHANNELS = (1, 3, 4)
CORRUPTION, DRAWS = 7_001, 7_002  # streams of random numbers: the same samples meet the same noise, whatever else is asked


@dataclass(frozen=True)
class Wishes:
    """What is asked beyond the reconstructions themselves."""

    corrupt: bool = False  # disturb the samples first, as training does
    images: bool = False  # one PNG a sample
    draws: int | None = None  # of z, for the bounds of log p(x)


@dataclass
class Rebuilt:
    """Rows on the scale of the data: the samples, what the encoder saw of them, what the decoder made of that."""

    x: np.ndarray  # (n, *shape) as stored
    seen: np.ndarray  # (n, *shape) float32
    rebuilt: np.ndarray  # (n, *shape) float32, clipped to the range of the data
    scores: dict[str, np.ndarray]  # (n,) each


def reconstruct(
    run: Path,
    data: str,
    out: Path,
    split: str | None = None,
    wishes: Wishes = Wishes(),
    reporter: Reporter | None = None,
    options: PackOptions = PackOptions(),
) -> Outcome:
    """Encode every sample of a data set as it is (E[z|x], no noise), decode, and write `out`: the results packed, and scores.

    `out` is a data set with the keys, labels, kind, dtype and range of `data`, so it can be trained on or predicted like any;
    beside it lie scores.parquet, a picture, and with `images` one PNG a sample. With `corrupt` the samples are first disturbed
    as in training, by noise that the recipe's seed decides, so that the clean ones to compare with are known. The mean squared
    error is a number's, on the data's own scale; PSNR is 10 log10(peak^2 / mse) in dB, of the mse over all rows, with peak the
    length of the data's range. Raises SslAeError before anything is written, and leaves nothing half-written.
    """
    reporter = reporter or Reporter()
    made = Autoencoder.load(run, reporter)
    place = out.expanduser().resolve()  # through a link, so that the folder can be renamed into its place
    _refuse(made, wishes, data, out, place)
    with tempfile.TemporaryDirectory(prefix="ssl-ae-") as folder:
        source = open_any(data, made.resolved.card.x, Path(folder), reporter, options)
        features = features_for(made.resolved.card.x, source.card.x, data, reporter)
        names = [*source.card.splits] if split is None else [split]
        rows = sum(source.card.split(name).rows for name in names)
        if not rows:
            raise DataError(f"{data} holds no samples in {' and '.join(names)}.")
        with _output_of(out, place) as folder:
            writing = _Writing(made, source, rows, features, wishes, folder)
            for name in names:
                with reporter.bar(f"reconstruct {name}", source.card.split(name).rows) as advance:
                    writing.split(name, advance)
            metrics = writing.finish(f"reconstruct:{made.resolved.recipe.name}")
            _refuse_taken(out, place)  # again, because all this takes its time
            files.move_folder(folder, place)
    outputs = {"data": out, "card": out / cards.FILE_NAME, "scores": out / SCORES, "picture": out / PICTURE}
    outputs |= {"images": out / IMAGES} if wishes.images else {}
    return Outcome("reconstruct", run, outputs=outputs, metrics=metrics, warnings=list(reporter.warnings))


class _Writing:
    """One data set on its way through the model into one folder."""

    def __init__(
        self, made: Autoencoder, source: DataSet, rows: int, features: np.ndarray | slice, wishes: Wishes, folder: Path
    ) -> None:
        self._made, self._source, self._features, self._wishes, self._folder = made, source, features, wishes, folder
        model, given = made.resolved.card.x, source.card.x
        named = {"shape": model.shape, "features": model.features or given.features}
        self._x = given.model_copy(update={**named, "mean": None, "std": None})
        self._every, self._train = Moments(), Moments()
        self._splits: dict[str, Split] = {}
        self._scores: dict[str, list[np.ndarray]] = {}
        # of the picture: neighbours are often alike
        self._wanted, self._done = np.linspace(0, rows - 1, min(SHOWN, rows)).round().astype(int), 0
        self._shown: list[Rebuilt] = []
        self._symbols = True  # whether every number of every code so far was 0 or 1

    def split(self, name: str, advance) -> None:
        """Reconstruct one split into shards and, where wished, pictures."""
        split = self._source.split(name)
        with ShardWriter(self._folder, name) as writer:
            for start in range(0, split.rows, BLOCK_ROWS):
                rows = np.arange(start, min(start + BLOCK_ROWS, split.rows))
                stored = split.read(rows)[:, self._features]
                for first in range(0, len(rows), BATCH_ROWS):
                    part = slice(first, first + BATCH_ROWS)
                    keys = split.keys[rows[part]]
                    self._take(writer, name, keys, self._rebuild(stored[part], (cards.SPLITS.index(name), start + first)))
                    advance(len(keys), "")
            shards = writer.close()
        self._splits[name] = Split(rows=split.rows, shards=shards)

    def finish(self, origin: str) -> dict[str, float]:
        """Labels, card, scores and the picture; the metrics of all rows."""
        from ssl_ae import figures

        card, labels = self._source.card, self._write_labels()
        update = {"name": f"{card.name}-reconstructed", "x": self._measured(), "splits": self._splits, "source": origin}
        card.model_copy(update={**update, "y": card.y if labels else None, "labels_sha256": labels}).save(self._folder)
        scores = {name: np.concatenate(parts) for name, parts in self._scores.items()}
        tables.write_parquet(self._folder / SCORES, scores)
        peak = _peak(self._x)
        x, seen, rebuilt = (np.concatenate([getattr(part, name) for part in self._shown]) for name in ("x", "seen", "rebuilt"))
        seen = seen if self._wishes.corrupt else None
        figures.reconstructions(self._folder / PICTURE, x, rebuilt, self._x.kind, seen, peak)
        return _metrics(scores, peak) | _sizes(self._made, self._x, self._symbols)

    def _rebuild(self, stored: np.ndarray, counters: tuple[int, int]) -> Rebuilt:
        """Rows (n, *shape) through the model; the noise depends on the recipe's seed and on where the rows lie, nothing else."""
        made, seed = self._made, self._made.resolved.recipe.seed
        model, scaling = made.model, made.scaling
        with _drawing(made.device), frozen(model), torch.inference_mode():
            x = scaling(torch.as_tensor(stored).to(made.device))
            seed_draws(seed_of(seed, CORRUPTION, *counters), made.device)
            seen = model.disturbed(x) if self._wishes.corrupt else x
            q, p_x = model.round_trip(seen)
            self._symbols = self._symbols and bool(((q.mean == 0) | (q.mean == 1)).all())
            scores = {"reconstruction_nats": -p_x.log_prob(x)}
            if self._wishes.draws:
                seed_draws(seed_of(seed, DRAWS, *counters), made.device)
                scores["elbo"] = bounds.elbo(model, seen, x, self._wishes.draws)
                scores["iwae"] = bounds.importance_weighted_bound(model, seen, x, self._wishes.draws)
            seen, rebuilt = (scaling.inverse(values).float().cpu().numpy() for values in (seen, p_x.mean))
            scores = {name: values.float().cpu().numpy() for name, values in scores.items()}
        rebuilt = np.clip(rebuilt, *self._x.range)
        errors = {"mse": _mse(rebuilt, stored)} | ({"mse_noisy": _mse(seen, stored)} if self._wishes.corrupt else {})
        return Rebuilt(stored, seen, rebuilt, errors | scores)

    def _take(self, writer: ShardWriter, split: str, keys: np.ndarray, found: Rebuilt) -> None:
        values = found.rebuilt.round() if self._x.dtype == "uint8" else found.rebuilt
        values = values.astype(self._x.dtype)
        writer.write(keys, values)
        self._every.add(values)
        if split == "train":
            self._train.add(values)
        for name, column in {"key": keys, **found.scores}.items():
            self._scores.setdefault(name, []).append(column)
        here = self._wanted[(self._wanted >= self._done) & (self._wanted < self._done + len(keys))] - self._done
        self._shown.append(Rebuilt(found.x[here], found.seen[here], found.rebuilt[here], {}))
        self._done += len(keys)
        if self._wishes.images:
            for key, value in zip(keys, found.rebuilt, strict=True):
                write_image(self._folder / IMAGES / _file_of(key), value, self._x)

    def _measured(self) -> X:
        """The range stays that of the data; what training standardises by is measured anew."""
        return described(self._x, self._every, self._train).model_copy(update={"range": self._x.range})

    def _write_labels(self) -> str | None:
        """The labels that are known of these samples; their sha256, or None where there are none."""
        keys = np.concatenate([self._source.split(name).keys for name in self._splits])
        labels = np.concatenate([self._source.labels(name) for name in self._splits])
        there = known(torch.from_numpy(labels)).numpy()
        if not there.any():
            return None
        path = self._folder / cards.LABELS_FILE_NAME
        LabelTable(keys[there], labels[there]).write(path)
        return files.sha256_of(path)


def _mse(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(n,) float32: mean over the numbers of each row."""
    apart = found.astype(np.float64) - expected
    return np.square(apart).reshape(len(apart), -1).mean(1).astype(np.float32)


def _peak(x: X) -> float:
    return x.range[1] - x.range[0]


def _metrics(scores: dict[str, np.ndarray], peak: float) -> dict[str, float]:
    """Means over all rows; PSNR is of the mean error, not a mean of each row's, which one perfect row would make infinite."""
    means = {name: float(values.mean(dtype=np.float64)) for name, values in scores.items() if name != "key"}
    found = {"rows": float(len(scores["key"]))} | means | {"psnr": psnr(means["mse"], peak)}
    if "mse_noisy" in means:
        found |= {"psnr_noisy": psnr(means["mse_noisy"], peak), "psnr_cleaned": found["psnr"]}
    return found


def psnr(mse: float, peak: float) -> float:
    """Peak signal-to-noise ratio 10 log10(peak^2 / mse) in dB; infinite without error."""
    return 10 * math.log10(peak**2 / mse) if mse else math.inf


def _sizes(made: Autoencoder, x: X, exact: bool) -> dict[str, float]:
    """Bytes of the code that was decoded, and of the sample it stands for.

    Float32 a dimension; where the encoder says that a code is of symbols, and `exact` ones were decoded instead of their
    probabilities, one bit for each of two values and log2 L, rounded up, for one of L.
    """
    encoder, latent = made.resolved.encoder, made.resolved.shapes.latent
    symbol = encoder.cls.symbol(encoder.config) if exact else None
    bits = 32 * latent if symbol is None else latent // symbol * max(1, math.ceil(math.log2(symbol)))
    stored = x.size * np.dtype(x.dtype).itemsize
    return {"bytes_per_sample": float(math.ceil(bits / 8)), "input_bytes_per_sample": float(stored)}


def _refuse(made: Autoencoder, wishes: Wishes, data: str, out: Path, place: Path) -> None:
    """Complaints that need no look at the samples."""
    _refuse_taken(out, place)
    if Path(data).expanduser().resolve() == place:
        raise DataError(f"--out {out} is the data set to be reconstructed. Name another folder.")
    resolved = made.resolved
    if wishes.corrupt and not any(
        "perturb" in part.cls.verbs and matches("input", part.layers or part.cls.layers) for part in resolved.regularizers
    ):
        raise RecipeError(
            f"--corrupt: the run {resolved.recipe.name} was trained without a corruption of its input. Leave --corrupt out, "
            "or pretrain with a noise among model.regularizers."
        )
    posterior = resolved.encoder.cls.posterior(resolved.encoder.config)
    if wishes.draws and posterior == "point":
        raise RecipeError(
            f"--draws {wishes.draws}: bounds of log p(x) need a random q(z|x) to draw codes from, but encoder "
            f"{resolved.encoder.full_name} gives {posterior}. Leave --draws out, or pretrain with "
            "model.encoder.posterior: diag or full."
        )
    if wishes.draws and (resolved.encoder.cls.conditional or resolved.decoder.cls.conditional):
        raise RecipeError(
            f"--draws {wishes.draws}: a label enters the model, and these bounds of log p(x) do not sum it out. "
            "Leave --draws out; finetuning measures the bound that does, of validation."
        )
    x = resolved.card.x
    if wishes.images and (x.kind != "image" or x.shape[0] not in PNG_CHANNELS):
        raise RecipeError(
            f"--images: a sample is a {x.kind} of shape {x.shape}; a PNG is an image of 1, 3 or 4 channels. Leave --images out."
        )


def _refuse_taken(out: Path, place: Path) -> None:
    """Only what an earlier `reconstruct` wrote may make way."""
    if place.exists() and not place.is_dir():
        raise DataError(f"--out {out} is a file. Name a folder.")
    ours = (place / SCORES).exists() and (place / cards.FILE_NAME).exists()
    if place.is_dir() and any(place.iterdir()) and not (ours and Card.load(place).source.startswith("reconstruct:")):
        raise DataError(f"--out {out} holds other files. Name a new or empty folder.")


@contextlib.contextmanager
def _output_of(out: Path, place: Path) -> Iterator[Path]:
    """A folder to fill beside `place`; a disk that fails is told as what it is."""
    try:
        with files.folder_aside(place) as folder:
            yield folder
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}.") from error


@contextlib.contextmanager
def _drawing(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside leave no trace."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        yield


def _file_of(key: str) -> str:
    """A path inside the folder whatever the key: `train/cat/17` -> `train/cat/17.png`, `../x` -> `%2E%2E/x.png`."""
    parts = [part if part.strip(".") else part.replace(".", "%2E") or "%" for part in key.replace("\0", "%00").split("/")]
    return "/".join(parts) + ".png"


def write_image(path: Path, value: np.ndarray, x: X) -> None:
    """(C, H, W) on the scale of the data: its range becomes 0 to 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.rint((value - x.range[0]) * (255 / (_peak(x) or 1.0))).astype(np.uint8)
    with open(path, "xb") as file:  # two keys that mean one file are an error, not one picture
        Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "png")
