"""Deliver the journals of a whole run folder now: `ssl-ae track sync RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_ae.errors import DataError, SslAeError
from ssl_ae.tracking import store
from ssl_ae.tracking.courier import refusal
from ssl_ae.tracking.delivery import Delivery
from ssl_ae.tracking.leftovers import end_if_dead, stages_of
from ssl_ae.tracking.reach import reason_of


def sync(run_folder: Path, uri: str | None = None) -> dict[str, Any]:
    """Deliver what the store (by default the one a run would report to) does not have yet.

    Returns {"store", "run_id" (the parent's), "stages": {name: {"run_id", "metrics", "datasets", "artifacts",
    "models"}}, "running": [stages left to their live process], "warnings": []}, counting what this call delivered.
    The runs of processes that died without a word are closed as KILLED. Raises DataError for a folder without journals
    and SslAeError when the store does not answer.
    """
    uri = store.store_uri(uri)
    store.set_client_defaults()
    stages = stages_of(run_folder)
    if not stages:
        raise DataError(f"{run_folder} holds no journal. Give the folder of a run, such as runs/NAME.")
    running = [stage for stage in stages if not end_if_dead(stage)]
    if not running:
        end_if_dead(run_folder)
    delivery = Delivery(run_folder, uri)
    report: dict[str, Any] = {"store": delivery.store, "stages": {}, "warnings": []}
    try:
        for stage in stages:
            if stage not in running:
                delivery.counts.clear()
                try:
                    run_id = delivery.deliver(stage)
                except DataError as error:  # this journal's: the others arrive
                    report["warnings"].append(str(error))
                    continue
                counts = {name: delivery.counts[name] for name in ("metrics", "datasets", "artifacts", "models")}
                report["stages"][_name(stage, run_folder)] = {"run_id": run_id, **counts}
        report["run_id"] = delivery.deliver_parent()
    except DataError:
        raise
    except Exception as error:
        raise SslAeError(
            f"MLflow at {delivery.store} does not answer ({reason_of(error)}). "
            f"Nothing is lost: run `ssl-ae track sync {run_folder}` again once it does."
        ) from error
    if delivery.refused:
        report["warnings"].append(refusal(delivery))
    return report | {"running": [_name(stage, run_folder) for stage in running]}


def _name(stage: Path, run_folder: Path) -> str:
    return stage.relative_to(run_folder).as_posix()
