"""What the same labels give without the unlabelled data: the honest comparison beside every finetuned model.

labels-only:            encoder and head of the same architecture, from scratch, by l_Y alone, for as many steps, on the samples
                        as they are
labels-only-augmented:  the same under the perturbations of the recipe (noise, distortions, dropout), where it has any
pca-logistic:           PCA of the unlabelled rows to K dimensions, then logistic (regression: ridge) regression on the labels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_ae import checkpoint, distributed, files
from ssl_ae.data.loading import Feed
from ssl_ae.model import Model
from ssl_ae.plan import labels_only
from ssl_ae.resolve import Part, Resolved
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.scoring import BATCH_ROWS, predict_rows
from ssl_ae.stages.training_run import train
from ssl_ae.stages.workspace import Workspace

LABELS_ONLY = "labels-only"
AUGMENTED = "labels-only-augmented"
NETWORKS = (LABELS_ONLY, AUGMENTED)  # that see no unlabelled row
PCA = "pca-logistic"
OF_LABELS = frozenset({"val/supervised", "val/accuracy", "val/rmse"})  # what early stopping may watch without a decoder
UNREAD = ("mode", "solver", "alpha", "labeled_fraction", "init")  # of the finetuning, by those who learn from labels alone
PCA_ROWS = 50_000  # at most so many train rows, evenly spaced, decide the principal components


def folder_of(ws: Workspace, labels: Labels) -> Path:
    """One folder for each choice of labels, architecture and training length: every mode shares it."""
    tree = ws.resolved.as_dict()
    training = {name: value for name, value in tree["finetune"].items() if name not in UNREAD}
    fields = [ws.card.fingerprint, labels.digest, tree["model"], training, tree["seed"], tree["precision"], ws.resolved.scale]
    if AUGMENTED in (networks := networks_of(ws.resolved)):
        fields += networks  # the folder without them may hold a labels-only of before, which was augmented
    if labels.weight is not None:
        fields += ["weighted"]  # the folder without it may hold a pca-logistic of before, which passed over the weights
    return ws.run / "baselines" / files.digest(fields)[:8]


def fit_baselines(ws: Workspace, labels: Labels, feed: Feed) -> Path:
    """Train them all, once for each choice of labels. Returns their folder."""
    folder = folder_of(ws, labels)
    for name, resolved in networks_of(ws.resolved).items():
        network = folder / f"{name}.safetensors"
        if not network.exists():
            weights = train_labels_only(replace(ws, resolved=resolved), labels, feed, name).state_dict()
            with distributed.main_first() as main:
                if main:
                    checkpoint.write_weights(network, weights, labels.digest)
    linear = folder / f"{PCA}.safetensors"
    with distributed.main_first() as main:
        if main and not linear.exists():
            checkpoint.write_weights(linear, fit_linear(ws, labels, fit_components(ws)), labels.digest)
    return folder


def networks_of(resolved: Resolved) -> dict[str, Resolved]:
    """What is trained on labels alone, by name: without the recipe's perturbations, and with them where there are any.

    None where the head is fitted at once: a network has nothing to learn from it.
    """
    if resolved.head.cls.fitted_at_once:
        return {}
    plain = tuple(part for part in resolved.regularizers if not perturbs(part))
    as_they_are = {LABELS_ONLY: replace(resolved, regularizers=plain)}
    return as_they_are if len(plain) == len(resolved.regularizers) else as_they_are | {AUGMENTED: resolved}


def perturbs(regularizer: Part) -> bool:
    """Whether it shows training something else than the samples as they are; what always changes them is no perturbation."""
    return bool(regularizer.cls.verbs & {"transform", "perturb"}) and not regularizer.cls.always


def train_labels_only(ws: Workspace, labels: Labels, feed: Feed, name: str) -> Model:
    """Encoder and head by l_Y alone. Where the recipe stops early, so does this, or the comparison would not be fair."""
    early = ws.recipe.finetune.early_stopping
    if early is not None and early.metric not in OF_LABELS:
        early = early.model_copy(update={"metric": "val/loss"})  # nothing else is measured without a decoder
    model = ws.fresh_model(head=True)
    model.head.prepare(torch.as_tensor(labels.y[labels.known]))
    plan = labels_only(ws.resolved, model, feed.split.rows, labels.count)
    training = ws.recipe.finetune.model_copy(update={"early_stopping": early})
    val = ws.labeled_feed("val") if early else None
    return train(ws, model, plan, feed, training, name=f"baseline {name}", val=val)[0]


def predict_baselines(ws: Workspace, folder: Path, split: str) -> dict[str, np.ndarray]:
    """{name: (N, C) probabilities or (N, T) values} of the baselines that were fitted."""
    feed, found = ws.labeled_feed(split), {}
    for name, resolved in networks_of(ws.resolved).items():
        if (folder / f"{name}.safetensors").exists():
            model = replace(ws, resolved=resolved).fresh_model(head=True)
            model.load_state_dict(checkpoint.read_weights(folder / f"{name}.safetensors"))
            found[name] = predict_rows(model, feed).values
    if (folder / f"{PCA}.safetensors").exists():
        found[PCA] = predict_linear(ws, checkpoint.read_weights(folder / f"{PCA}.safetensors"), feed)
    return found


@dataclass(frozen=True)
class Components:
    """The principal components of the scaled train rows, flat: `mean` (D,), `basis` (K, D), `spread` (K,) of each component."""

    mean: np.ndarray
    basis: np.ndarray
    spread: np.ndarray

    def codes(self, x: np.ndarray) -> np.ndarray:
        """x (n, D) -> (n, K)."""
        return x @ self.basis.T - self.mean @ self.basis.T


def fit_components(ws: Workspace) -> Components:
    """As many as the recipe's code has numbers."""
    from sklearn.decomposition import PCA as ScikitPCA

    split = ws.data.split("train")
    step = -(-split.rows // PCA_ROWS)
    x = scaled(ws, split.read(np.arange(0, split.rows, step)))
    pca = ScikitPCA(min(ws.recipe.model.latent_dim, *x.shape), random_state=ws.recipe.seed).fit(x)
    # contiguous, as when they are read from a file: products of the same numbers in another order in memory differ in a bit
    return Components(pca.mean_, np.ascontiguousarray(pca.components_), np.sqrt(np.maximum(pca.explained_variance_, 1e-12)))


def fit_linear(ws: Workspace, labels: Labels, components: Components) -> dict[str, Tensor]:
    """PCA and the linear model on it, folded into one map of the scaled sample: weight (C, D), bias (C,).

    Labels of weight 0 are as good as unknown.
    """
    known = labels.known if labels.weight is None else labels.known & (labels.weight > 0)
    rows = ws.data.split("train").read(np.flatnonzero(known))
    features = components.codes(scaled(ws, rows)) / components.spread
    of_rows = None if labels.weight is None else labels.weight[known]
    weight, bias = linear_model(features, labels.y[known], of_rows, len(ws.card.y.names), ws.card.y.task)
    weight = (weight / components.spread) @ components.basis
    return {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias - weight @ components.mean).float()}


def linear_model(
    z: np.ndarray, y: np.ndarray, of_rows: np.ndarray | None, outputs: int, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (C, K) and bias (C,) by scikit-learn, under the weights `of_rows` (n,); a class without labels has bias -inf."""
    from sklearn.linear_model import LogisticRegression, Ridge

    weight, bias = np.zeros((outputs, z.shape[1])), np.full(outputs, -np.inf)
    if task == "classes":
        seen = np.unique(y)
        if len(seen) == 1:
            bias[seen] = 0.0
        else:
            model = LogisticRegression(max_iter=1000).fit(z, y, of_rows)
            two = len(seen) == 2  # one row for two classes: the log-odds of the second
            weight[seen] = np.concatenate([np.zeros_like(model.coef_), model.coef_]) if two else model.coef_
            bias[seen] = np.concatenate([[0.0], model.intercept_]) if two else model.intercept_
        return weight, bias
    for t in range(outputs):
        there = ~np.isnan(y[:, t])
        target, own = y[there, t], None if of_rows is None else of_rows[there]
        if task == "multilabel" and len(np.unique(target)) == 2:
            model = LogisticRegression(max_iter=1000).fit(z[there], target, own)
            weight[t], bias[t] = model.coef_[0], model.intercept_[0]
        elif task == "multilabel":
            bias[t] = np.inf if len(target) and target[0] else -np.inf
        else:
            model = Ridge().fit(z[there], target, own)
            weight[t], bias[t] = model.coef_, model.intercept_
    return weight, bias


def predict_linear(ws: Workspace, linear: dict[str, Tensor], feed: Feed) -> np.ndarray:
    """(N, C) class probabilities, or (N, T) values, of every row."""
    parts = [linear_prediction(ws, linear, batch.x) for batch in feed.in_order(BATCH_ROWS, np.arange(feed.split.rows))]
    return torch.cat(parts).cpu().numpy()


def linear_prediction(ws: Workspace, linear: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, C) class probabilities, or (B, T) values."""
    raw = x.flatten(1) @ linear["weight"].to(x.device).T + linear["bias"].to(x.device)
    return {"classes": lambda: raw.softmax(1), "multilabel": raw.sigmoid, "regression": lambda: raw}[ws.card.y.task]()


def scaled(ws: Workspace, stored: np.ndarray) -> np.ndarray:
    """Stored samples as the model sees them, flat: (n, D)."""
    return ws.scaling(torch.from_numpy(stored).to(ws.device)).flatten(1).cpu().numpy()
