"""The finetuned model as MLflow keeps it: code and artifacts, never a pickle."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_ae.tracking.journal import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "model"
ARTIFACTS = "run"  # the key under which a served model finds its folder

_KEY = "ssl_ae.key"
_DISTRIBUTIONS = ("ssl-ae", "mlflow", "torch", "numpy", "pandas")


def deliver(client: MlflowClient, experiment_id: str, run_id: str, event: Event, code_path: Path, artifacts_folder: Path) -> None:
    """Log the model of a `model` event as the run's output, loadable as `runs:/RUN_ID/model`.

    `mlflow.pyfunc.log_model` would do it by the global tracking URI and the active run, which are the user's; this
    takes the same steps through the client. A delivery that was cut off is taken up by the event's key.
    """
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    search = f"source_run_id = '{run_id}' AND tags.`{_KEY}` = '{event['key']}'"
    found = client.search_logged_models([experiment_id], search)
    if any(model.status == LoggedModelStatus.READY for model in found):
        return
    model = found[0] if found else client.create_logged_model(experiment_id, NAME, run_id, tags={_KEY: event["key"]})
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        if event["files"]:
            artifacts_folder = _selected(artifacts_folder, event["files"], Path(temporary) / ARTIFACTS)
        pyfunc.save_model(
            folder,
            python_model=str(code_path),
            artifacts={ARTIFACTS: str(artifacts_folder)},
            model_config={"x": event["x"]},
            metadata={"x": event["x"]},
            pip_requirements=_requirements(event["requirements"]),
            mlflow_model=Model(
                artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
            ),
        )
        client.log_model_artifacts(model.model_id, folder)
    outputs = client.get_run(run_id).outputs.model_outputs
    if model.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _selected(folder: Path, names: Sequence[str], to: Path) -> Path:
    """A folder with these files of `folder` alone: a stage's checkpoints and journals are no part of its model."""
    to.mkdir()
    for name in names:
        shutil.copy2(folder / name, to / name)
    return to


def _requirements(more: Sequence[str]) -> list[str]:
    """Installed versions, without local suffixes such as `+cpu` that no package index knows."""
    requirements = list(more)
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ssl-ae itself may run from a checkout
            requirements.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
    return requirements
