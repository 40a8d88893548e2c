"""What a command answers: the one JSON object of `--json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssl_ae.files import without_nan


@dataclass(frozen=True)
class Outcome:
    command: str
    run: Path | None
    status: Literal["done", "skipped"] = "done"
    outputs: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    warnings: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # what a command adds to the common fields

    def as_json(self) -> dict[str, Any]:
        common = {
            "command": self.command,
            "run": None if self.run is None else str(self.run),
            "status": self.status,
            "outputs": {name: str(path) for name, path in self.outputs.items()},
            "metrics": self.metrics,
            "mlflow_run_id": self.mlflow_run_id,
            "warnings": self.warnings,
        }
        return without_nan({**common, **self.more})
