"""A place to go on from: weights (safetensors), optimizer state (tensors only) and progress (JSON), whole or not at all.

A checkpoint is a folder that appears by one rename, with a manifest of every file's sha256: neither torch nor safetensors
notices a flipped bit. Two are kept; a damaged newest gives way, aloud, to the one before. Damage never means starting from 0.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ssl_ae import files
from ssl_ae.errors import CheckpointError

KEPT = 2
WEIGHTS, STATE, PROGRESS, MANIFEST = "model.safetensors", "state.pt", "progress.json", "manifest.json"
DAMAGE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError, CheckpointError)


@dataclass
class Checkpoint:
    """Everything training goes on from. Random numbers need no saving: they come from (seed, step, rank)."""

    weights: dict[str, Tensor]
    state: dict[str, Any]  # optimizers and averages: tensors, numbers, texts, lists and dicts of them
    progress: dict[str, Any]  # JSON; holds "step"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNNNNNN`; older ones beyond the newest two are removed afterwards."""
    files.make_folder(folder)
    final = folder / f"step-{checkpoint.progress['step']:010d}"
    aside = folder / f".{final.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        (aside / WEIGHTS).write_bytes(save(contiguous(checkpoint.weights)))
        torch.save(checkpoint.state, aside / STATE)
        files.write_json(aside / PROGRESS, checkpoint.progress)
        names = sorted(path.name for path in aside.iterdir())
        for name in names:
            with open(aside / name, "rb+") as file:
                os.fsync(file.fileno())
        files.write_json(aside / MANIFEST, {name: files.sha256_of(aside / name) for name in names})
        if final.exists():  # the same step saved twice: keep whichever is whole
            shutil.rmtree(final)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in _saved(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, warnings: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever saved. Damaged ones are named in `warnings`.

    Raises CheckpointError when all are damaged: starting over would lose the work without a word.
    """
    saved = _saved(folder)
    damage = []
    for path in saved:
        try:
            return _load(path)
        except DAMAGE as error:
            damage.append(f"{path}: {error}")
            warnings.append(f"checkpoint {path.name} is damaged ({error}); going on from the one before it.")
    if damage:
        raise CheckpointError("every checkpoint is damaged:\n" + "\n".join(damage) + "\nStart over with --restart.")
    return None


def write_weights(path: Path, weights: dict[str, Tensor], fingerprint: str) -> None:
    """A finished stage's weights. The bytes depend on weights and fingerprint alone."""
    with files.whole_file(path) as aside:
        aside.write_bytes(save(contiguous(weights), metadata={"fingerprint": fingerprint}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError for a file that is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _load(path: Path) -> Checkpoint:
    manifest = files.read_json(path / MANIFEST)
    if sorted(manifest) != sorted([WEIGHTS, STATE, PROGRESS]):
        raise CheckpointError(f"{MANIFEST} does not name its files")
    for name, expected in manifest.items():
        if files.sha256_of(path / name) != expected:
            raise CheckpointError(f"{name} does not have the sha256 of its manifest")
    return Checkpoint(
        weights=load_file(path / WEIGHTS),
        state=torch.load(path / STATE, map_location="cpu", weights_only=True),
        progress=files.read_json(path / PROGRESS),
    )
