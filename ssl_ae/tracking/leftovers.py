"""What earlier stages of a run folder left to deliver, and whether somebody still writes it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ssl_ae.tracking.journal import FOLDER, Journal, last_turn, opened, rank_file, rank_files
from ssl_ae.tracking.system import is_alive

SILENT_SECONDS = 600.0  # a living stage writes a sample of its machine every 10 s; clocks of several machines may differ


def stages_of(run_folder: Path) -> list[Path]:
    """The folders of the stages that have a journal; runs that lie inside are not the run's own, and neither are their stages."""
    found = sorted(path.parent.parent for path in run_folder.glob(f"*/**/{FOLDER}/rank-0.jsonl"))
    runs = {folder for folder in found if _is_run(folder)}
    return [folder for folder in found if runs.isdisjoint((folder, *folder.parents))]


def _is_run(folder: Path) -> bool:
    """Whether a journal is that of a run folder: a stage says which one it is."""
    first = opened(rank_file(folder, 0))
    return first is not None and "tags" not in first


def end_if_dead(folder: Path) -> bool:
    """Whether nobody writes this journal; one whose process died is ended in its name, at the time of its last word.

    A process on another machine cannot be asked: it counts as dead once its journals, and those of the stages below, are silent.
    """
    path = rank_file(folder, 0)
    turn = last_turn(path)
    if turn is None or turn["event"] == "close":
        return True
    alive = is_alive(turn.get("writer"))
    if alive or (alive is None and time.time() - _last_word(folder) < SILENT_SECONDS):
        return False
    died = path.stat().st_mtime
    journal = Journal(path)
    journal.append("close", status="KILLED", time=int(died * 1_000))
    journal.close()
    os.utime(path, (died, died))  # the last word was its process's, and the parent's silence is measured by it
    return True


def _last_word(folder: Path) -> float:
    """When anything was written to a journal of this folder or below, in seconds since 1970."""
    journals = [path for below in (folder, *stages_of(folder)) for path in rank_files(below)]
    return max(path.stat().st_mtime for path in journals)
