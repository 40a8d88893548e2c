"""A place to go on from: weights (safetensors), optimizer state (tensors only) and progress (JSON), whole or not at all.

A checkpoint is a folder that appears by one rename, with a manifest of every file's sha256: neither torch nor safetensors
notices a flipped bit. Two are kept; a damaged newest gives way, aloud, to the one before. Damage never means starting from 0.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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


class Saver:
    """Saves without making the next step wait: a copy on the device now, the rest in one thread of its own.

    One save at a time: the next waits for the one before, and raises what went wrong in it. So does `wait`, which whoever
    says that the place is saved must call first.
    """

    def __init__(self, folder: Path, resumed: int | None = None) -> None:
        """`resumed`: the step that training went on from; checkpoints beyond it are damaged, and go once another is saved."""
        self._folder, self._resumed = folder, resumed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises DiskError and whatever else the save before met."""
        self.wait()
        self._pending = self._thread.submit(self._write, copied(checkpoint))

    def wait(self) -> None:
        """Until the last save is on the disk. Raises what it met, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, fetch: Callable[[], Checkpoint]) -> None:
        save_checkpoint(self._folder, fetch(), self._resumed)
        self._resumed = None


def copied(checkpoint: Checkpoint) -> Callable[[], Checkpoint]:
    """A copy as it is now, which the returned function brings to the host, in whatever thread it is called.

    On a GPU the copy is queued behind the steps so far and is fetched beside those that follow. Where there is no memory
    for it, and on devices that one thread alone may use, it is fetched at once.
    """
    tensors = list(_tensors([checkpoint.weights, checkpoint.state]))
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if any(tensor.device.type not in ("cpu", "cuda") for tensor in tensors):
        here = _mapped(checkpoint, lambda tensor: tensor.detach().to("cpu", copy=True))
        return lambda: here
    try:
        there = _mapped(checkpoint, lambda tensor: tensor.detach().clone())
    except torch.OutOfMemoryError:
        here = _mapped(checkpoint, lambda tensor: tensor.detach().to("cpu", copy=True))
        return lambda: here
    copied_at = [torch.cuda.current_stream(device).record_event() for device in devices]

    def fetch() -> Checkpoint:
        with contextlib.ExitStack() as stack:
            for device, event in zip(devices, copied_at, strict=True):
                beside = torch.cuda.Stream(device)
                beside.wait_event(event)
                stack.enter_context(torch.cuda.stream(beside))
            return _mapped(there, Tensor.cpu)

    return fetch


def save_checkpoint(folder: Path, checkpoint: Checkpoint, resumed: int | None = None) -> Path:
    """Write `folder/step-NNNNNNNNNN`; afterwards all but this and the one before are removed. Raises DiskError.

    The one before is at most that of step `resumed`, where training went on from it: newer ones are damaged.
    """
    final = folder / f"step-{checkpoint.progress['step']:010d}"
    with files.folder_aside(final) as aside:
        digests = {
            WEIGHTS: _write(aside / WEIGHTS, lambda file: file.write(save(contiguous(checkpoint.weights)))),
            STATE: _write(aside / STATE, lambda file: torch.save(checkpoint.state, file)),
            PROGRESS: _write(aside / PROGRESS, lambda file: file.write(_as_json(checkpoint.progress))),
        }
        files.write_json(aside / MANIFEST, digests)
        files.move_folder(aside, final)
    whole = [path for path in _saved(folder) if path == final or resumed is None or _step_of(path) <= resumed]
    for path in set(_saved(folder)).difference(whole[:KEPT]):
        files.remove_folder(path)
    return final


def load_checkpoint(folder: Path, warnings: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever saved. Damaged ones are named in `warnings`.

    Raises CheckpointError when all are damaged: starting over would lose the work without a word.
    """
    damage = []
    for path in _saved(folder):
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


class _Digested:
    """A file that knows the sha256 of what was written, and the error that torch tells in words of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, fill: Callable[[_Digested], Any]) -> str:
    """The sha256 of a file that `fill` writes, on the disk."""
    with open(path, "wb") as file:
        digested = _Digested(file)
        try:
            fill(digested)
        except Exception:
            if digested.error is not None:
                raise digested.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return digested.sha256.hexdigest()


def _as_json(value: Any) -> bytes:
    return json.dumps(files.without_nan(value), ensure_ascii=False).encode()


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed, in new lists and dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Checkpoint):
        weights, state = _mapped([tree.weights, tree.state], change)
        return Checkpoint(weights, state, {name: copy.copy(value) for name, value in tree.progress.items()})
    if isinstance(tree, dict):
        return {name: _mapped(value, change) for name, value in tree.items()}
    return [_mapped(value, change) for value in tree] if isinstance(tree, list) else tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


def _saved(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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
