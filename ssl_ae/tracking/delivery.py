"""From the journals to MLflow: a pass delivers what is there, in batches; the cursor moves after each acknowledgement.

Delivering twice changes nothing: a metric is keyed by (run, key, timestamp, step, value), a parameter keeps its first
value, an artifact overwrites itself, a run and a model are found again by a tag that the journal chose.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_ae import files
from ssl_ae.errors import DataError
from ssl_ae.tracking import logged_model, store
from ssl_ae.tracking.journal import Cursor, Event, opened, rank_file, rank_files, read_events

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

IDENTITY = "ssl_ae.identity"

_METRICS_A_CALL = 1_000  # MLflow's limits of log_batch
_PARAMETERS_A_CALL = 100
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE"}


class Refused(Exception):
    """The store answered, and will give the same answer the next time: this event is left out."""


class Delivery:
    """Delivers a run folder's parent run and some of its stages to one store.

    `deliver` raises whatever a store that does not answer makes of it; calling it again goes on where it stopped.
    `on_progress` is called after every acknowledgement.
    """

    def __init__(self, run_folder: Path, uri: str, on_progress: Callable[[], None] = lambda: None) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.run_folder = run_folder
        self.on_progress = on_progress
        self.store = store.without_password(uri)
        self._uri = uri
        self._client: MlflowClient | None = None
        self._parent = _RunDelivery(self, run_folder, None)
        self._stages: dict[Path, _RunDelivery] = {}

    def deliver(self, stage_folder: Path) -> str:
        """Deliver what the journals of the parent and of every rank of the stage hold now; the stage's run id."""
        self.deliver_parent()
        stage = self._stages.setdefault(stage_folder, _RunDelivery(self, stage_folder, self._parent))
        return stage.deliver()

    def is_delivered(self, stage_folder: Path) -> bool:
        """Whether the store acknowledged all that the journals of a stage hold now, as far as the cursor knows."""
        offsets = Cursor(stage_folder, self.store).offsets
        return all(offsets.get(path.name) == path.stat().st_size for path in rank_files(stage_folder))

    def deliver_parent(self) -> str:
        """Deliver the run folder's own journal; returns the parent run's id."""
        return self._parent.deliver()

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient

            if database := store.database_file(self._uri):
                store.create_database(database)
            self._client = MlflowClient(self._uri)
            self.on_progress()
        return self._client

    def experiment(self, name: str) -> str:
        """The experiment's id; created where it is new, restored where somebody deleted it."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            database = store.database_file(self._uri)
            location = store.artifact_folder(database).as_uri() if database else None
            return self.client.create_experiment(name, artifact_location=location)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id


class _RunDelivery:
    """The journals of one folder and the MLflow run they become."""

    def __init__(self, delivery: Delivery, folder: Path, parent: _RunDelivery | None) -> None:
        self._delivery = delivery
        self._folder = folder
        self._parent = parent
        self._cursor = Cursor(folder, delivery.store)
        self._run_id: str | None = None
        self._experiment_id = ""

    @property
    def run_id(self) -> str:
        if self._run_id is None:
            self._attach()
        assert self._run_id is not None
        return self._run_id

    def deliver(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self._deliver_events()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the run vanished: the next pass makes a new one
                self._run_id = None
            raise
        return self.run_id

    def _attach(self) -> None:
        """Find the run: by the cursor, else by its identity; else create it. A run deleted by hand is begun anew."""
        first = opened(rank_file(self._folder, 0))
        if first is None:
            raise DataError(f"{rank_file(self._folder, 0)} does not say whose it is: its first line is gone or damaged.")
        client = self._delivery.client
        self._experiment_id = self._delivery.experiment(first["experiment"])
        search = f"tags.`{IDENTITY}` = '{first['identity']}'"
        found = [run.info.run_id for run in client.search_runs([self._experiment_id], search)]
        if found:
            run_id = self._cursor.run_id if self._cursor.run_id in found else found[0]
        else:
            tags = {IDENTITY: first["identity"]}
            if self._parent:
                tags["mlflow.parentRunId"] = self._parent.run_id
            run = client.create_run(self._experiment_id, first["time"], tags, first["name"])
            run_id = run.info.run_id
        if run_id != self._cursor.run_id:
            self._cursor.run_id, self._cursor.offsets = run_id, {}
            self._cursor.save()
        files.write_text(self._folder / "mlflow_run_id", f"{run_id}\n")
        self._run_id = run_id
        self._delivery.on_progress()

    def _deliver_events(self) -> None:
        run_id = self.run_id
        metrics: list[Metric] = []
        reached: dict[str, int] = {}  # of each journal, where the cursor goes once `metrics` are acknowledged
        for path in rank_files(self._folder):
            for event, end in read_events(path, self._cursor.offsets.get(path.name, 0)):
                if event and event["event"] == "metrics":
                    more = _metrics(event)
                    if len(metrics) + len(more) > _METRICS_A_CALL:
                        self._send(run_id, metrics, reached)
                    metrics += more
                else:
                    self._send(run_id, metrics, reached)
                    self._take(run_id, event)
                    self._acknowledge({path.name: end})
                    continue
                reached[path.name] = end
        self._send(run_id, metrics, reached)

    def _send(self, run_id: str, metrics: list[Metric], reached: dict[str, int]) -> None:
        if metrics:
            with self._noting_refusals(f"{len(metrics)} metrics"):
                self._delivery.client.log_batch(run_id, metrics=metrics, synchronous=True)
                self._delivery.counts["metrics"] += len(metrics)
            self._acknowledge(reached)
            metrics.clear()
            reached.clear()

    def _acknowledge(self, reached: dict[str, int]) -> None:
        self._cursor.offsets |= reached
        self._cursor.save()
        self._delivery.on_progress()

    @contextmanager
    def _noting_refusals(self, what: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except Refused as error:
            self._delivery.refused.append(f"{what}: {error}")
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._delivery.refused.append(f"{what}: {error.message}")

    def _take(self, run_id: str, event: Event | None) -> None:
        takers = {
            "open": self._open,
            "close": self._close,
            "dataset": self._dataset,
            "artifact": self._artifact,
            "model": self._model,
        }
        kind = event["event"] if event else None
        if event is None or kind not in takers:
            self._delivery.refused.append("a line of the journal that is damaged or of a later version")
            return
        with self._noting_refusals(kind):
            takers[kind](run_id, event)
            self._delivery.counts[f"{kind}s"] += 1

    def _open(self, run_id: str, event: Event) -> None:
        from mlflow.entities import Param, RunTag

        client = self._delivery.client
        client.update_run(run_id, status="RUNNING")
        known = client.get_run(run_id).data.params
        parameters: dict[str, str] = event.get("parameters", {})
        new = [Param(name, value) for name, value in parameters.items() if name not in known]
        for start in range(0, len(new), _PARAMETERS_A_CALL):
            client.log_batch(run_id, params=new[start : start + _PARAMETERS_A_CALL], synchronous=True)
        # MLflow never changes a parameter; one that a resumed stage changed (more epochs, say) is told by a tag
        changed = {name: value for name, value in parameters.items() if known.get(name, value) != value}
        tags = event.get("tags", {}) | {f"resumed.{name}"[:250]: value for name, value in changed.items()}
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)

    def _close(self, run_id: str, event: Event) -> None:
        self._delivery.client.set_terminated(run_id, event["status"], event["time"])

    def _dataset(self, run_id: str, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": event["source"]}), json.dumps({"num_rows": event["rows"]})
        dataset = Dataset(event["name"], event["digest"], "local", source, profile=profile)
        context = InputTag("mlflow.data.context", event["context"])
        self._delivery.client.log_inputs(run_id, [DatasetInput(dataset, [context])])

    def _artifact(self, run_id: str, event: Event) -> None:
        path = self._path(event["path"])
        if path.is_dir():
            folder = "/".join(part for part in (event["folder"], path.name) if part)
            self._delivery.client.log_artifacts(run_id, str(path), folder)
        else:
            self._delivery.client.log_artifact(run_id, str(path), event["folder"] or None)

    def _model(self, run_id: str, event: Event) -> None:
        code, artifacts = self._path(event["code"]), self._path(event["artifacts"])
        logged_model.deliver(self._delivery.client, self._experiment_id, run_id, event, code, artifacts)

    def _path(self, place: str) -> Path:
        path = self._delivery.run_folder / place
        if not path.exists():
            raise Refused(f"{path} is gone")
        return path


def _metrics(event: dict[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), event["time"], event["step"]) for name, value in event["values"].items()]
