"""A head that is fitted at once, inside a stage: what it may read, and what it found out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl_ae import distributed
from ssl_ae.components import TableHead
from ssl_ae.findings import Findings
from ssl_ae.model import Model
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.rival import Rival
from ssl_ae.stages.scoring import BATCH_ROWS
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress


def fit_head(ws: Workspace, model: Model, z: np.ndarray, labels: Labels, tracker: Tracker, name: str) -> Progress:
    """Fit the model's head on the stored latents z (N, K) of the train split, on every rank alike: no steps to speak of.

    A head with a rival may take that one's encoder for the model.
    """
    head = model.head
    if labels.weight is not None:
        ws.reporter.warn(f"head {ws.resolved.head.full_name} takes every label as equally sure: the weights are not used.")
    torch.manual_seed(ws.recipe.seed)
    rival = head.rival() if ws.resolved.encoder.cls.differentiable else None
    networks = [Rival(ws, model, rival, name)] if rival is not None else []
    fit(head, ws, torch.from_numpy(z), labels, *networks)
    return Progress() if head.found is None else Progress(found=tell(ws, head.found, tracker))


def fit(head: TableHead, ws: Workspace, z: Tensor, labels: Labels, *networks: Rival) -> None:
    """Fit a head on z (N, K), with tensors on the device of the run where it takes them there; it is left on that device."""
    place = head.place(ws.device)
    table = (z, torch.from_numpy(labels.y), *samples_for(head, ws, labels.known))
    head.fit(*(each.to(place) for each in table), *networks)
    head.to(ws.device)


def samples_for(head: TableHead, ws: Workspace, known: np.ndarray) -> list[Tensor]:
    """What `fit` takes beside the latents: of the rows that it reads, (n, D) scaled samples, on the host.

    known: which rows have a label, (N,) bool.
    """
    if head.reads_all_samples(head.config):
        rows = np.arange(len(known))
    elif head.reads_samples:
        rows = np.flatnonzero(known)  # the others may be more than fit there
    else:
        return []
    read = ws.data.split("train").read
    parts = [rows[at : at + BATCH_ROWS] for at in range(0, len(rows), BATCH_ROWS)]
    return [torch.cat([ws.scaling(torch.from_numpy(read(part)).to(ws.device)).flatten(1).cpu() for part in parts])]


def tell(ws: Workspace, found: Findings, tracker: Tracker) -> dict[str, float]:
    """Show the user what a head found out, and track its numbers; returns those."""
    if found.rows:
        ws.reporter.table(found.title, found.columns, found.rows)
    for sentence in found.said:
        ws.reporter.say(sentence)
    for warning in found.warnings:
        ws.reporter.warn(warning)
    if distributed.is_main():
        tracker.metrics(found.metrics, 0)
    return dict(found.metrics)
