"""What the same labels give without the unlabelled data: the honest comparison beside every finetuned model.

labels-only:   encoder and head of the same architecture, from scratch, by l_Y alone, for as many steps
pca-logistic:  PCA of the unlabelled rows to K dimensions, then logistic (regression: ridge) regression on the labels
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_ae import checkpoint, distributed, files
from ssl_ae.data.loading import Feed
from ssl_ae.model import Model
from ssl_ae.plan import labels_only
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.scoring import BATCH_ROWS, predict_rows
from ssl_ae.stages.training_run import train
from ssl_ae.stages.workspace import Workspace

LABELS_ONLY = "labels-only"
PCA = "pca-logistic"
OF_LABELS = frozenset({"val/supervised", "val/accuracy", "val/rmse"})  # what early stopping may watch without a decoder
PCA_ROWS = 50_000  # at most so many train rows, evenly spaced, decide the principal components


def folder_of(ws: Workspace, labels: Labels) -> Path:
    """One folder for each choice of labels, architecture and training length: every mode shares it."""
    tree = ws.resolved.as_dict()
    unread = ("mode", "solver", "alpha", "labeled_fraction", "init")
    training = {name: value for name, value in tree["finetune"].items() if name not in unread}
    fields = [ws.card.fingerprint, labels.digest, tree["model"], training, tree["seed"], tree["precision"], ws.resolved.scale]
    return ws.run / "baselines" / files.digest(fields)[:8]


def fit_baselines(ws: Workspace, labels: Labels, feed: Feed) -> Path:
    """Train both, once for each choice of labels. Returns their folder."""
    folder = folder_of(ws, labels)
    network, linear = folder / f"{LABELS_ONLY}.safetensors", folder / f"{PCA}.safetensors"
    if not ws.resolved.head.cls.fitted_at_once and not network.exists():
        weights = train_labels_only(ws, labels, feed).state_dict()
        with distributed.main_first() as main:
            if main:
                checkpoint.write_weights(network, weights, labels.digest)
    with distributed.main_first() as main:
        if main and not linear.exists():
            checkpoint.write_weights(linear, fit_linear(ws, labels), labels.digest)
    return folder


def train_labels_only(ws: Workspace, labels: Labels, feed: Feed) -> Model:
    """Encoder and head by l_Y alone. Where the recipe stops early, so does this, or the comparison would not be fair."""
    early = ws.recipe.finetune.early_stopping
    if early is not None and early.metric not in OF_LABELS:
        early = early.model_copy(update={"metric": "val/loss"})  # nothing else is measured without a decoder
    model = ws.fresh_model(head=True)
    model.head.prepare(torch.as_tensor(labels.y[labels.known]))
    plan = labels_only(ws.resolved, model, feed.split.rows, labels.count)
    training = ws.recipe.finetune.model_copy(update={"early_stopping": early})
    val = ws.labeled_feed("val") if early else None
    return train(ws, model, plan, feed, training, name=f"baseline {LABELS_ONLY}", val=val)[0]


def predict_baselines(ws: Workspace, folder: Path, split: str) -> dict[str, np.ndarray]:
    """{name: (N, C) probabilities or (N, T) values} of the baselines that were fitted."""
    feed, found = ws.labeled_feed(split), {}
    if (folder / f"{LABELS_ONLY}.safetensors").exists():
        model = ws.fresh_model(head=True)
        model.load_state_dict(checkpoint.read_weights(folder / f"{LABELS_ONLY}.safetensors"))
        found[LABELS_ONLY] = predict_rows(model, feed).values
    if (folder / f"{PCA}.safetensors").exists():
        linear = checkpoint.read_weights(folder / f"{PCA}.safetensors")
        parts = [linear_prediction(ws, linear, batch.x) for batch in feed.in_order(BATCH_ROWS, np.arange(feed.split.rows))]
        found[PCA] = torch.cat(parts).cpu().numpy()
    return found


def fit_linear(ws: Workspace, labels: Labels) -> dict[str, Tensor]:
    """PCA and the linear model on it, folded into one map of the scaled sample: weight (C, D), bias (C,)."""
    from sklearn.decomposition import PCA as ScikitPCA

    split = ws.data.split("train")
    step = -(-split.rows // PCA_ROWS)
    x = _scaled(ws, split.read(np.arange(0, split.rows, step)))
    pca = ScikitPCA(min(ws.recipe.model.latent_dim, *x.shape), random_state=ws.recipe.seed).fit(x)
    spread = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
    features = pca.transform(_scaled(ws, split.read(np.flatnonzero(labels.known)))) / spread
    weight, bias = linear_model(features, labels.y[labels.known], len(ws.card.y.names), ws.card.y.task)
    weight = (weight / spread) @ pca.components_
    return {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias - weight @ pca.mean_).float()}


def linear_model(z: np.ndarray, y: np.ndarray, outputs: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight (C, K) and bias (C,) by scikit-learn; a class without labels has bias -inf."""
    from sklearn.linear_model import LogisticRegression, Ridge

    weight, bias = np.zeros((outputs, z.shape[1])), np.full(outputs, -np.inf)
    if task == "classes":
        seen = np.unique(y)
        if len(seen) == 1:
            bias[seen] = 0.0
        else:
            model = LogisticRegression(max_iter=1000).fit(z, y)
            two = len(seen) == 2  # one row for two classes: the log-odds of the second
            weight[seen] = np.concatenate([np.zeros_like(model.coef_), model.coef_]) if two else model.coef_
            bias[seen] = np.concatenate([[0.0], model.intercept_]) if two else model.intercept_
        return weight, bias
    for t in range(outputs):
        there = ~np.isnan(y[:, t])
        target = y[there, t]
        if task == "multilabel" and len(np.unique(target)) == 2:
            model = LogisticRegression(max_iter=1000).fit(z[there], target)
            weight[t], bias[t] = model.coef_[0], model.intercept_[0]
        elif task == "multilabel":
            bias[t] = np.inf if len(target) and target[0] else -np.inf
        else:
            model = Ridge().fit(z[there], target)
            weight[t], bias[t] = model.coef_, model.intercept_
    return weight, bias


def linear_prediction(ws: Workspace, linear: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, C) class probabilities, or (B, T) values."""
    raw = x.flatten(1) @ linear["weight"].to(x.device).T + linear["bias"].to(x.device)
    return {"classes": lambda: raw.softmax(1), "multilabel": raw.sigmoid, "regression": lambda: raw}[ws.card.y.task]()


def _scaled(ws: Workspace, stored: np.ndarray) -> np.ndarray:
    return ws.scaling(torch.from_numpy(stored).to(ws.device)).flatten(1).cpu().numpy()
