"""A head that is fitted at once, inside a stage: what it may read, and what it found out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl_ae import distributed
from ssl_ae.findings import Findings
from ssl_ae.model import Model
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.rival import Rival
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress


def fit_head(ws: Workspace, model: Model, z: np.ndarray, labels: Labels, tracker: Tracker, name: str) -> Progress:
    """Fit the model's head on the stored latents z (N, K) of the train split, on every rank the same: no steps to speak of.

    A head with a rival may take that one's encoder for the model.
    """
    head = model.head
    if labels.weight is not None:
        ws.reporter.warn(f"head {ws.resolved.head.full_name} takes every label as equally sure: the weights are not used.")
    torch.manual_seed(ws.recipe.seed)
    rival = head.rival()
    samples = [labeled_samples(ws, labels)] if head.reads_samples else []
    networks = [Rival(ws, model, rival, name)] if rival is not None else []
    head.fit(torch.from_numpy(z), torch.from_numpy(labels.y), *samples, *networks)
    found = head.findings()
    return Progress() if found is None else Progress(found=tell(ws, found, tracker))


def labeled_samples(ws: Workspace, labels: Labels) -> Tensor:
    """(L, D) scaled samples of the labelled rows, on the host: the others may be more than fit there."""
    stored = ws.data.split("train").read(np.flatnonzero(labels.known))
    return ws.scaling(torch.from_numpy(stored).to(ws.device)).flatten(1).cpu()


def tell(ws: Workspace, found: Findings, tracker: Tracker) -> dict[str, float]:
    """Show the user what a head found out, and track its numbers; returns those."""
    ws.reporter.table(found.title, found.columns, found.rows)
    for sentence in found.said:
        ws.reporter.say(sentence)
    for warning in found.warnings:
        ws.reporter.warn(warning)
    if distributed.is_main():
        tracker.metrics(found.metrics, 0)
    return dict(found.metrics)
