"""What a finetuned or evaluated model shows: tables, figures, and the model that MLflow serves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from ssl_ae import runs
from ssl_ae.runs import StageFolder
from ssl_ae.stages import served_model
from ssl_ae.stages.baselines import NETWORKS
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.scoring import HEADLINE, Predictions, better
from ssl_ae.stages.training_run import curves
from ssl_ae.stages.workspace import Workspace
from ssl_ae.tracking import Tracker
from ssl_ae.training import Progress

Scores = Mapping[str, Mapping[str, float]]


def tell_comparison(ws: Workspace, split: str, methods: Scores, baselines: Scores, same_labels: Collection[str]) -> None:
    """Methods and baselines side by side on one split; a warning for each method that no unlabelled data was needed for.

    `same_labels`: the methods that learned from the labels of the baselines, so that the comparison is fair.
    """
    if not any(methods.values()):
        ws.reporter.say(f"no row of {split} has a label, so nothing can be compared there.")
        return
    columns = list(dict.fromkeys(name for scores in (*methods.values(), *baselines.values()) for name in scores))
    rows = [[name, *(_cell(scores, column) for column in columns)] for name, scores in methods.items()]
    rows += [
        [f"{name} (no unlabelled data)" if name in NETWORKS else f"{name} (no network)", *(_cell(s, c) for c in columns)]
        for name, s in baselines.items()
    ]
    scored, total = Labels(ws.labels(split), None).count, ws.card.split(split).rows
    ws.reporter.table(
        f"{split}, {scored:,} labelled of {total:,} rows" if scored < total else f"{split}, {total:,} rows", ["", *columns], rows
    )
    headline = HEADLINE[ws.card.y.task]
    for name, scores in methods.items():
        if name not in same_labels:
            continue
        ahead = [
            f"{other} ({found[headline]:.4g})"
            for other, found in baselines.items()
            if not better(ws.card.y.task, scores[headline], found[headline])
        ]
        if ahead:
            ws.reporter.warn(
                f"the unlabelled data did not help {name}: its {headline} on {split}, {scores[headline]:.4g}, is no better than "
                f"{' and '.join(ahead)} with the same labels."
            )


def _cell(scores: Mapping[str, float], column: str) -> str:
    value = scores.get(column)
    return "" if value is None else f"{100 * value:.2f} %" if column in ("accuracy", "error") else f"{value:.4g}"


def draw_figures(
    ws: Workspace, progress: Progress, stage: StageFolder, tracker: Tracker, predictions: Predictions | None, y: np.ndarray
) -> None:
    """Learning curves; and of the validation rows the confusion matrix and the map of the codes that the head saw."""
    if not ws.published:
        return
    from ssl_ae import figures

    folder = stage.path / "figures"
    if progress.history:
        tracker.artifact(figures.learning_curves(folder / "learning_curves.png", curves(progress)), "figures")
    if predictions is None:
        return
    if ws.card.y.task == "classes" and (y >= 0).any():
        path = figures.confusion_matrix(folder / "confusion_val.png", y, predictions.values.argmax(1), ws.card.y.names)
        tracker.artifact(path, "figures")
    tracker.artifact(figures.latent_map(folder / "latent_map.png", predictions.codes, y, ws.card.y.names), "figures")


def log_model(ws: Workspace, stage: StageFolder, tracker: Tracker) -> None:
    """The finetuned model as an MLflow pyfunc defined from code: it answers on raw rows."""
    tracker.model(
        code_path=Path(served_model.__file__),
        artifacts_folder=stage.path,
        files=(runs.MODEL, runs.RECIPE, runs.CARD),
        x=ws.card.x.model_dump(mode="json"),
    )
