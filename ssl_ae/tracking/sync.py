"""Deliver the journals of a whole run folder now: `ssl-ae track sync RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_ae.errors import DataError, SslAeError
from ssl_ae.tracking import store
from ssl_ae.tracking.courier import first_line, refusal
from ssl_ae.tracking.delivery import Delivery
from ssl_ae.tracking.journal import FOLDER, Journal, last_turn, rank_file
from ssl_ae.tracking.system import is_alive


def sync(run_folder: Path, uri: str | None = None) -> dict[str, Any]:
    """Deliver what the store (by default the one a run would report to) does not have yet.

    Returns {"store", "run_id" (the parent's), "stages": {name: {"run_id", "metrics", "datasets", "artifacts",
    "models"}}, "running": [stages left to their live process], "warnings": []}, counting what this call delivered.
    The runs of processes that died without a word are closed as KILLED. Raises DataError for a folder without journals
    and SslAeError when the store does not answer.
    """
    uri = store.store_uri(uri)
    store.set_client_defaults()
    stages = sorted(path.parent.parent for path in run_folder.glob(f"*/**/{FOLDER}/rank-0.jsonl"))
    if not stages:
        raise DataError(f"{run_folder} holds no journal. Give the folder of a run, such as runs/NAME.")
    running = [stage for stage in stages if not _end_if_dead(stage)]
    if not running:
        _end_if_dead(run_folder)
    delivery = Delivery(run_folder, uri)
    report: dict[str, Any] = {"store": delivery.store, "stages": {}, "warnings": []}
    try:
        for stage in stages:
            if stage not in running:
                delivery.counts.clear()
                run_id = delivery.deliver(stage)
                counts = {name: delivery.counts[name] for name in ("metrics", "datasets", "artifacts", "models")}
                report["stages"][_name(stage, run_folder)] = {"run_id": run_id, **counts}
        report["run_id"] = delivery.deliver_parent()
    except Exception as error:
        raise SslAeError(
            f"MLflow at {delivery.store} does not answer ({first_line(str(error) or type(error).__name__)}). "
            f"Nothing is lost: run `ssl-ae track sync {run_folder}` again once it does."
        ) from error
    if delivery.refused:
        report["warnings"].append(refusal(delivery))
    return report | {"running": [_name(stage, run_folder) for stage in running]}


def _end_if_dead(folder: Path) -> bool:
    """Whether nobody writes this journal; one whose process died is ended in its name, at the time of its last word."""
    path = rank_file(folder, 0)
    turn = last_turn(path)
    if turn is None or turn["event"] == "close":
        return True
    if is_alive(turn["writer"]):
        return False
    died = int(path.stat().st_mtime * 1_000)
    journal = Journal(path)
    journal.append("close", status="KILLED", time=died)
    journal.close()
    return True


def _name(stage: Path, run_folder: Path) -> str:
    return stage.relative_to(run_folder).as_posix()
