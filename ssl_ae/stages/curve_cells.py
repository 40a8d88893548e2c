"""The cells of a label curve: one method on one draw of labels, each made once and kept under its fingerprint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_ae import files
from ssl_ae.errors import SslAeError, Stopped
from ssl_ae.recipe import with_fields
from ssl_ae.stages.curve_methods import Curve, Method
from ssl_ae.stages.workspace import Workspace

CELLS = "cells"  # the folder of what is finished, and of what is under way


@dataclass(frozen=True)
class Cell:
    """One method on one draw of labels."""

    method: Method
    labels: int
    seed: int
    fingerprint: str

    def place(self, curve: Curve) -> Path:
        """The file that is there once the cell is made; before, the folder of that name without its suffix may be."""
        name = f"labels-{self.labels}-seed-{self.seed}-{self.fingerprint[:8]}.json"
        return curve.run / CELLS / self.method.name / name

    def found(self, curve: Curve) -> dict[str, float] | None:
        """What the cell came to, with `seconds` of processor time; None where it has to be made."""
        try:
            record = files.read_json(self.place(curve))
            return record["scores"] if record["fingerprint"] == self.fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def cells_of(curve: Curve, ws: Workspace, methods: Sequence[Method], labels: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, draw by draw: the first to be finished are those that compare."""
    shared = {
        "card": ws.card.fingerprint,
        "labels_sha256": ws.data.labels_sha256,
        "scale": ws.resolved.scale,
        "split": curve.split,
    }
    own = {method.name: method.fields(ws) for method in methods}

    def cell(method: Method, count: int, seed: int) -> Cell:
        fields: dict[str, Any] = shared | {"method": own[method.name], "name": method.name, "labels": count, "seed": seed}
        return Cell(method, count, seed, files.digest(files.plain(fields)))

    return [cell(method, count, seed) for seed in seeds for count in labels for method in methods]


def make(curve: Curve, cell: Cell) -> dict[str, float]:
    """Make a cell, or go on with it; its run folder is used up once its scores are written.

    Seconds of an interrupted cell are those since it went on.
    """
    place, begun = cell.place(curve), time.process_time()
    folder = place.with_suffix("")
    budget = {"data.labels": {"total": cell.labels, "seed": cell.seed}, "finetune.baselines": False}
    try:
        scores = cell.method.scores(curve, with_fields(curve.recipe, budget, curve.source), folder)
    except Stopped:
        raise
    except SslAeError as error:
        raise type(error)(f"{cell.method.name} on {cell.labels:,} labels, draw {cell.seed}: {error}") from error
    scores = {**scores, "seconds": time.process_time() - begun}
    files.write_json(place, {"fingerprint": cell.fingerprint, "scores": scores})
    files.remove_folder(folder)
    return scores
