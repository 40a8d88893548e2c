"""evaluate: every finished method of a run on one split, beside what the same labels give without unlabelled data."""

from __future__ import annotations

import numpy as np

from ssl_ae import distributed, files
from ssl_ae.errors import DataError
from ssl_ae.model import Model
from ssl_ae.registry import Registry
from ssl_ae.runs import RECIPE, StageFolder
from ssl_ae.stages.baselines import folder_of, predict_baselines
from ssl_ae.stages.labels import Labels, labels_of
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import finished_method, finished_methods
from ssl_ae.stages.report import tell_comparison
from ssl_ae.stages.scoring import predict_rows, score
from ssl_ae.stages.stored import card_with_labels, kept_recipe, read_model, resolve_stored
from ssl_ae.stages.workspace import Workspace


def evaluate(ws: Workspace, split: str | None = None, method: str | None = None) -> Outcome:
    """Score all finished methods on `split`; the top-level metrics are those of `method`, else of the last finished.

    Without `split`: test, or val where the data has no test split, as it says then.
    """
    if split is None:
        split = "test" if "test" in ws.card.splits else "val"
        if split == "val":
            ws.reporter.say(f"{ws.data.path} has no test split: these are figures of val.")
    ws.card.split(split)
    chosen = finished_method(ws.run, method)
    name = chosen.path.name
    spaces = {stage.path.name: workspace_of(ws, stage) for stage in finished_methods(ws.run)}
    judge = spaces[name]
    y = judge.labels(split)
    if not Labels(y, None).count:
        raise DataError(f"split {split!r} of {ws.data.path} has no labels to evaluate against.")
    predictions = {other: predict_split(own, other, split) for other, own in spaces.items()}
    methods = {other: score(predictions[other], own.labels(split), own.card.y) for other, own in spaces.items()}
    rivals = {other: folder_of(own, labels_of(own)) for other, own in spaces.items()}
    found = predict_baselines(judge, rivals[name], split)
    baselines = {rival: score(values, y, judge.card.y) for rival, values in found.items()}
    same_labels = {other for other in spaces if rivals[other] == rivals[name]}
    tell_comparison(judge, split, {name: methods[name]} | methods, baselines, same_labels)
    outputs = write(judge, split, chosen, methods, baselines, predictions[name], y)
    return Outcome(
        "evaluate",
        ws.run,
        outputs=outputs,
        metrics=methods[name],
        mlflow_run_id=StageFolder(ws.run / "evaluate" / split).mlflow_run_id(),
        warnings=list(ws.reporter.warnings),
        more={"split": split, "method": name, "rows": len(y), "methods": methods, "baselines": baselines},
    )


def workspace_of(ws: Workspace, stage: StageFolder) -> Workspace:
    """The workspace as the method's own recipe describes it."""
    stored = kept_recipe(stage.path)
    resolved = resolve_stored(stored, Registry.discover(), card_with_labels(stored, ws.data), str(stage.path / RECIPE))
    feeds = ws._feeds if resolved.scale == ws.resolved.scale else {}
    return Workspace(resolved, ws.data, ws.run, ws.device, ws.reporter, feeds, ws.published)


def predict_split(ws: Workspace, method: str, split: str) -> np.ndarray:
    """(N, C) probabilities or (N, T) values of a finished method."""
    return predict_rows(model_of(ws, StageFolder(ws.run / "finetune" / method)), ws.labeled_feed(split)).values


def model_of(ws: Workspace, stage: StageFolder) -> Model:
    """The model of a finished method, whose workspace this is. Raises CheckpointError where its weights are damaged."""
    model = ws.fresh_model(head=True)
    model.load_state_dict(read_model(ws.resolved, stage.weights()))
    return model.to(ws.device)  # the buffers of a table head come from the file, so from the host


def write(
    ws: Workspace,
    split: str,
    chosen: StageFolder,
    methods: dict[str, dict[str, float]],
    baselines: dict[str, dict[str, float]],
    predictions: np.ndarray,
    y: np.ndarray,
) -> dict:
    """RUN/evaluate/SPLIT: metrics.json and the confusion matrix, and an MLflow run of their own."""
    from ssl_ae import figures

    stage = StageFolder(ws.run / "evaluate" / split)
    outputs = {"report": stage.path / "metrics.json"}
    if ws.card.y.task == "classes":
        outputs["confusion"] = stage.path / "figures" / f"confusion_{split}.png"
    report = {"split": split, "method": chosen.path.name, "rows": len(y), "methods": methods, "baselines": baselines}
    with distributed.main_first() as main:
        if main:
            files.make_folder(stage.path)
            ws.keep_recipe(stage.path)
            files.write_json(outputs["report"], report)
            if "confusion" in outputs:
                figures.confusion_matrix(outputs["confusion"], y, predictions.argmax(1), ws.card.y.names)
    with ws.tracker(stage, f"evaluate/{split}", [split]) as tracker:
        if distributed.is_main():
            for name, scores in (methods | baselines).items():
                tracker.metrics({f"{split}/{name}/{key}": value for key, value in scores.items()}, step=0)
            tracker.metrics({f"{split}/{key}": value for key, value in methods[chosen.path.name].items()}, step=0)
            for name, path in outputs.items():
                tracker.artifact(path, "" if name == "report" else "figures")
    return outputs
