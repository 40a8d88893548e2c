"""predict: labels, probabilities and reconstruction scores for new data; and the predictor that MLflow serves."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ssl_ae import files, recipe, runs, tables
from ssl_ae.data.card import Card, X, Y
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.loading import Scaling
from ssl_ae.data.pack import pack
from ssl_ae.data.remote import is_url
from ssl_ae.data.sources import PackOptions
from ssl_ae.data.sources.targets import OF_PREDICTIONS
from ssl_ae.distributed import choose_device
from ssl_ae.errors import CheckpointError, DataError, did_you_mean, listing
from ssl_ae.model import Model, build, frozen
from ssl_ae.progress import Reporter
from ssl_ae.registry import Registry
from ssl_ae.runs import StageFolder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.scoring import BATCH_ROWS, values_of
from ssl_ae.stages.stored import on_this_machine, read_model, resolve_stored
from ssl_ae.trace import Batch

MADE_BY = "ssl_ae.model_fingerprint"  # in the metadata of the table


@dataclass
class Predictor:
    """A finetuned model on raw rows: `predict(x)` with x as the data set stores it."""

    model: Model
    scaling: Scaling
    card: Card
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> Predictor:
        """From a finished finetune folder, or a copy of its model.safetensors, recipe.yaml and card.json."""
        card = Card.load(folder)
        if card.y.task == "regression" and (taken := OF_PREDICTIONS & set(card.y.names)):
            raise DataError(
                f"{folder} predicts {min(taken)!r}, and a table of predictions has a column of that name already. "
                "Pack the source again with another name for it."
            )
        stored = recipe.load(folder / runs.RECIPE)
        resolved = resolve_stored(stored, Registry.discover(), card, str(folder / runs.RECIPE))
        chosen = choose_device(device)
        model = build(resolved, head=True)
        model.load_state_dict(read_model(resolved, StageFolder(folder).weights()))
        return cls(model.to(chosen).eval(), Scaling(card.x, resolved.scale).to(chosen), card, chosen)

    def predict(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """x (n, *shape) as stored -> label (n,), probability (n,), p_CLASS (n,) each, reconstruction_nats (n,).

        Regression and multi-label: one column a target. Each row is predicted by itself.
        """
        values, nats = [], []
        with frozen(self.model), torch.inference_mode():
            for start in range(0, len(x), BATCH_ROWS):
                batch = Batch(self.scaling(torch.as_tensor(x[start : start + BATCH_ROWS]).to(self.device)))
                q, p_x = self.model.round_trip(batch.x)
                values.append(values_of(self.model.p_y(q.mean, batch.x)).float().cpu().numpy())
                nats.append(-p_x.log_prob(batch.target).float().cpu().numpy())
        width = len(self.card.y.names)
        return columns_of(np.concatenate(values) if values else np.empty((0, width), np.float32), self.card.y) | {
            "reconstruction_nats": np.concatenate(nats) if nats else np.empty(0, np.float32)
        }


def columns_of(values: np.ndarray, y: Y) -> dict[str, np.ndarray]:
    """values (n, C) probabilities or (n, T) expected targets, as the columns of the predictions' table."""
    if y.task != "classes":
        return {f"p_{name}" if y.task == "multilabel" else name: values[:, t] for t, name in enumerate(y.names)}
    best = values.argmax(1)
    label = np.array(y.names, dtype=object)[best]
    return {"label": label, "probability": values.max(1)} | {f"p_{name}": values[:, c] for c, name in enumerate(y.names)}


def predict(
    run: Path,
    data: str,
    out: Path,
    method: str | None = None,
    reporter: Reporter | None = None,
    options: PackOptions = PackOptions(),
    split: str | None = None,
) -> Outcome:
    """Predict every sample of a data set (packed, WebDataset, or anything `data pack` reads) into one Parquet file.

    `split`: of this split alone. `options` say which columns of a table are its key and labels, as for `data pack`.
    """
    reporter = reporter or Reporter()
    files.check_name("--out", out, ".parquet", "the predictions are a Parquet file")
    stage = finished_method(run, method)
    predictor = Predictor.load(stage.path, on_this_machine(recipe.load(stage.path / runs.RECIPE), reporter).device)
    keys, parts = [], []
    with tempfile.TemporaryDirectory(prefix="ssl-ae-") as aside:
        source = open_any(data, predictor.card.x, Path(aside), reporter, options)
        features = features_for(predictor.card.x, source.card.x, data, reporter)
        files.sweep(files.make_folder(out.parent), out.name)  # what a killed prediction left of the same file
        for name in source.card.splits if split is None else [split]:
            samples = source.split(name)
            with reporter.bar(f"predict {name}", samples.rows) as advance:
                for block in np.array_split(np.arange(samples.rows), max(1, -(-samples.rows // 16_384))):
                    parts.append(predictor.predict(samples.read(block)[:, features]))
                    keys.append(samples.keys[block])
                    advance(len(block), "")
    columns = {"key": np.concatenate(keys)} | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    tables.write_parquet(out, columns, {MADE_BY: stage.fingerprint})
    return Outcome(
        "predict",
        run,
        outputs={"predictions": out},
        metrics={"rows": float(len(columns["key"]))},
        warnings=list(reporter.warnings),
        more={"method": stage.path.name},
    )


def open_any(data: str, x: X, aside: Path, reporter: Reporter, options: PackOptions) -> DataSet:
    """A data set as it is, or another source packed into a folder that is thrown away, its images resized to those of `x`."""
    path = Path(data)
    if is_url(data) or (path.is_dir() and ((path / runs.CARD).exists() or list(path.glob("*.tar")))):
        return DataSet.open(data)
    sources = Registry.discover().sources()
    if path.exists() or any(kind.recognises(data) for kind in sources):
        reporter.say(f"reading {data}")
    resizes = x.kind == "image" and any(kind.resizes for kind in sources if kind.recognises(data))
    pack(data, aside / "data", replace(options, size=x.shape[1:] if resizes else None), sources)
    return DataSet.open(aside / "data")


def features_for(model: X, given: X, place: str, reporter: Reporter) -> np.ndarray | slice:
    """Which entries of the first axis of a sample the model takes: a vector's by name, where both sides have names.

    Raises DataError for samples that the model cannot take.
    """
    if model.features and given.features:
        missing = [name for name in model.features if name not in given.features]
        if missing:
            raise DataError(
                f"{place} lacks {len(missing)} of the model's {len(model.features)} columns: {', '.join(missing[:10])}. "
                f"It has {listing(given.features, 'and')}."
            )
        return np.array([given.features.index(name) for name in model.features])
    if given.shape != model.shape:
        raise DataError(f"{place} holds samples of shape {given.shape}; the model takes {model.shape}.")
    if model.kind != "vector" and given.range != model.range:
        reporter.warn(
            f"the values of {place} may go from {given.range[0]:g} to {given.range[1]:g}, those that the model learned from "
            f"went from {model.range[0]:g} to {model.range[1]:g}: make sure that they mean the same."
        )
    return slice(None)


def finished_methods(run: Path) -> list[StageFolder]:
    """Finished finetunings of a run, oldest first."""
    stages = [StageFolder(path.parent) for path in run.glob(f"finetune/*/{runs.STAGE}")]
    return sorted((s for s in stages if s.done), key=lambda s: ((s.path / runs.STAGE).stat().st_mtime_ns, s.path.name))


def finished_method(run: Path, method: str | None) -> StageFolder:
    """The named method, or the last finished. Raises CheckpointError where there is none."""
    found = finished_methods(run)
    if not found:
        raise CheckpointError(f"{run} holds no finetuned model. Run `ssl-ae finetune RECIPE --out {run}` first.")
    if method is None:
        return found[-1]
    names = {stage.path.name: stage for stage in found}
    if method not in names:
        raise CheckpointError(f"--method {method}: {run} has {listing(names, 'and')}.{did_you_mean(method, names)}")
    return names[method]
