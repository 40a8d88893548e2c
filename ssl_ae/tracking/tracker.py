"""`Tracker`: what a stage reports. Every call appends to the journal and returns; nothing here waits for MLflow."""

from __future__ import annotations

import posixpath
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ssl_ae.errors import Stopped
from ssl_ae.tracking.courier import Courier
from ssl_ae.tracking.journal import Journal, as_json_number, now, opened, rank_file, read_events
from ssl_ae.tracking.store import live_store
from ssl_ae.tracking.system import Sampler, this_process

Status = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_NAME = 250  # MLflow's limits, in characters
_MAX_PARAMETER = 6_000
_MAX_TAG = 8_000
_MAX_METRICS = 1_000  # an event must fit one call of log_batch


class Tracker:
    """Reports one stage of a run as an MLflow run under the run folder's parent run. A context manager.

    `parameters` may be nested: `{"model": {"latent_dim": 32}}` is the parameter `model.latent_dim`. A stage that is
    opened again (resumed) goes on in the MLflow run it had. Rank 0 delivers; other ranks only write their own journal,
    and should be closed before rank 0. With `deliver=False`, or SSL_AE_TRACKING=journal in the environment, the journal
    waits for `sync`.

    Raises SslAeError when MLFLOW_TRACKING_URI names a store that cannot work, and from any call when the disk is full.
    A store that does not answer is never an error, only one entry of `warnings`.
    """

    def __init__(
        self,
        stage_folder: Path,
        *,
        experiment: str,
        run_folder: Path,
        stage: str,
        parameters: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        rank: int = 0,
        deliver: bool = True,
    ) -> None:
        if stage_folder == run_folder:
            raise ValueError("a stage needs a folder of its own: the run folder's journal is the parent run's")
        uri = live_store() if rank == 0 and deliver else None
        self.warnings: list[str] = []
        self._run_folder = run_folder
        self._closed = False
        self._run_id: str | None = None
        self._journal = Journal(rank_file(stage_folder, rank))
        self._parent_journal = Journal(rank_file(run_folder, 0)) if rank == 0 else None
        if self._parent_journal:
            tags = _tags({**(tags or {}), "ssl_ae.stage": stage})
            _open(self._parent_journal, experiment, run_folder.name)
            _open(self._journal, experiment, stage, parameters=flatten(parameters or {}), tags=tags)
        self._began = next((event["time"] for event, _ in read_events(self._journal.path) if event), now())
        self._courier = Courier(run_folder, stage_folder, uri, self.warnings) if uri else None
        self._sampler = Sampler(self._system, rank)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step, such as `train/loss`. nan and infinities are kept."""
        items = [(_name(name), as_json_number(value)) for name, value in values.items()]
        for start in range(0, len(items), _MAX_METRICS):
            self._journal.append("metrics", step=int(step), values=dict(items[start : start + _MAX_METRICS]))

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """An input of this run. `digest` is cut at MLflow's 36 characters; `context` is its role, such as `train`."""
        self._journal.append("dataset", name=name[:500], digest=digest[:36], source=source, context=context[:500], rows=int(rows))

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder to copy into `folder` of the run's artifacts. It must stay as it is until delivered."""
        self._journal.append("artifact", path=self._place(path), folder=folder)

    def model(
        self,
        code_path: Path,
        artifacts_folder: Path,
        x: Mapping[str, Any],
        files: Sequence[str] = (),
        requirements: Sequence[str] = (),
    ) -> None:
        """The run's `model`: a pyfunc model defined by a script that calls `ssl_ae.tracking.serving.serve`.

        `artifacts_folder` (or only these `files` of it) is copied into the model and handed to the script's loader.
        `x` is a sample as the data card
        says it: kind, dtype, shape and, for a vector, features. `requirements` are pip's, beyond ssl-ae's own.
        """
        x = {field: x.get(field) for field in ("kind", "dtype", "shape", "features")}
        self._journal.append(
            "model",
            key=uuid.uuid4().hex,
            code=self._place(code_path),
            artifacts=self._place(artifacts_folder),
            files=list(files),
            x={field: list(value) if isinstance(value, tuple) else value for field, value in x.items()},
            requirements=list(requirements),
        )

    def close(self, status: Status = "FINISHED", timeout_seconds: float = 60.0) -> str | None:
        """End the stage's run and wait until everything is delivered; the MLflow run's id, or None if it is not.

        A store that answers is waited for as long as it makes progress; one that does not, `timeout_seconds` at most.
        """
        if not self._closed:
            self._closed = True
            self._sampler.stop()
            if self._parent_journal:
                self._journal.append("close", status=status)
                self._parent_journal.append("close", status=status)
                self._parent_journal.close()
            self._journal.close()
            if self._courier:
                self._run_id = self._courier.finish(timeout_seconds)
        return self._run_id

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, (Stopped, KeyboardInterrupt))
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def _system(self, values: Mapping[str, float]) -> None:
        self.metrics(values, step=(now() - self._began) // 1_000)  # seconds since the stage was first opened

    def _place(self, path: Path) -> str:
        """Relative to the run folder where it lies inside, so that a run folder can be moved before it is delivered."""
        path, folder = path.absolute(), self._run_folder.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _open(journal: Journal, experiment: str, name: str, **contents: Any) -> None:
    """Begin or go on: the identity that the first `open` chose names the MLflow run for good."""
    first = opened(journal.path)
    identity = first["identity"] if first else uuid.uuid4().hex
    journal.append("open", identity=identity, experiment=experiment, name=name, writer=this_process(), **contents)


def flatten(parameters: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`, names and values within MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[_name(f"{prefix}{key}")] = str(value)[:_MAX_PARAMETER]
    return flat


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_name(name): str(value)[:_MAX_TAG] for name, value in tags.items()}


def _name(name: str) -> str:
    """The nearest name MLflow allows: letters, digits and `_-. :`, and `/` between the parts of a path without `..`."""
    path = posixpath.normpath("/" + re.sub(r"[^\w\-. /:]", "_", name)).lstrip("/")
    return path[:_MAX_NAME].rstrip("/") or "_"
