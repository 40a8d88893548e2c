"""What a person checks first when something does not work. Each check stands by itself: torch may be absent or broken.

Nothing here imports torch, mlflow or a plugin before the check that needs it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from ssl_ae.cores import usable_cores
from ssl_ae.errors import SslAeError, listing

if TYPE_CHECKING:
    from ssl_ae.doctor.trial import Trial

DISTRIBUTION = "ssl-ae"
TOLD = ("torch", "mlflow")  # the two whose versions a report of a bug needs most
PINS = Path(__file__).parents[1] / "constraints.txt"  # in a checkout; an installed package comes without
STORE_PATIENCE_SECONDS = 3.0
GB = 1e9
LEAST_FREE, LITTLE_FREE = 0.2 * GB, 2 * GB  # below which a disk is as good as full, and worth a word

Status = Literal["ok", "warning", "broken", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check found: a line for a person, `facts` for a program."""

    status: Status
    text: str
    cures: list[str] = field(default_factory=list)  # a line each: what is wrong with what, and what to do
    facts: dict[str, Any] = field(default_factory=dict)


def examine() -> Iterator[tuple[str, Finding]]:
    """Every check in turn, with its name. A check that fails in a way of its own is `broken`, and the next one goes on."""
    torch_trouble = _import_torch()
    checks: dict[str, Callable[[], Finding]] = {
        "versions": versions,
        "devices": lambda: devices(torch_trouble),
        "plugins": lambda: plugins() if torch_trouble is None else _without_torch("plugins are subclasses of its modules"),
        "store": store,
        "disk": disk,
        "self-test": lambda: self_test() if torch_trouble is None else _without_torch("there is nothing to train with"),
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:  # the doctor must not fall ill of what it finds
            reason = str(error) if isinstance(error, SslAeError) else f"{type(error).__name__}: {error}"
            yield name, Finding("broken", reason)


def _import_torch() -> str | None:
    """Why torch cannot be imported, or None."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # a missing library of the system is an OSError, a version that is too old anything
        return f"{type(error).__name__}: {error}"
    return None


def _without_torch(why: str) -> Finding:
    return Finding("skipped", f"not without torch: {why}")


def versions() -> Finding:
    """Every package that ssl-ae needs beside the range that it allows."""
    own = metadata.version(DISTRIBUTION)
    pins = _pins()
    found: dict[str, str | None] = {}
    cures, unpinned = [], []
    for needed in _requirements():
        installed = _installed(needed.name)
        found[needed.name] = installed
        if installed is None:
            cures.append(f"{needed.name} is not installed: pip install '{needed}'")
        elif not needed.specifier.contains(installed, prereleases=True):
            cures.append(f"{needed.name} {installed} is outside {needed.specifier}: pip install '{needed}'")
        elif needed.name.lower() in pins and not _same_release(installed, pins[needed.name.lower()]):
            unpinned.append(f"{needed.name} {installed} (tested with {pins[needed.name.lower()]})")
    told = [f"{name} {found[name]}" for name in TOLD if found.get(name)]
    text = listing([f"Python {platform.python_version()}", f"ssl-ae {own}", *told], "and")
    right = len(found) - len(cures)
    text += f"; {right} of {len(found)} packages within their range"
    if unpinned:
        text += f"; not as pinned: {listing(unpinned, 'and')}"
    facts = {"python": platform.python_version(), "platform": platform.platform(), "ssl-ae": own, "packages": found}
    return Finding("broken" if cures else "ok", text, cures, facts)


def _requirements() -> list[Requirement]:
    """What ssl-ae itself needs, without its extras."""
    needed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    return [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pins() -> dict[str, str]:
    if not PINS.exists():
        return {}
    lines = (line.split(";")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return {name.lower(): version for name, sign, version in (line.partition("==") for line in lines) if sign}


def _same_release(installed: str, pin: str) -> bool:
    try:
        return Version(installed).public == Version(pin).public  # a build for CUDA is the same release
    except InvalidVersion:
        return installed == pin


def devices(torch_trouble: str | None = None) -> Finding:
    """Cores, memory, GPUs, and which device `auto` takes."""
    there, usable = os.cpu_count() or 1, usable_cores()
    memory = psutil.virtual_memory()
    text = f"{usable:g} of {there} cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory free"
    facts: dict[str, Any] = {"cores": there, "usable_cores": usable, "memory_bytes": memory.total}
    if torch_trouble is not None:
        cure = "install torch as https://pytorch.org says for this machine, then ssl-ae's other packages"
        return Finding("broken", f"{text}; torch cannot be imported: {torch_trouble}", [cure], facts)
    import torch

    from ssl_ae.distributed import choose_device, computes_bf16

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps, threads, device = torch.backends.mps.is_available(), torch.get_num_threads(), choose_device("auto")
    auto, precision = device.type, "bf16" if computes_bf16(device) else "fp32"
    facts |= {"cuda": [gpu.name for gpu in gpus], "mps": mps, "torch_threads": threads, "auto": auto, "precision": precision}
    named = [f"{gpu.name} ({gpu.total_memory / GB:.0f} GB)" for gpu in gpus] or ["no CUDA"]
    text += f"; {listing(named, 'and')}{'; MPS' if mps else ''}; device: auto takes {auto}, precision: auto {precision}"
    if not gpus and torch.version.cuda and (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        cure = f"torch was built for CUDA {torch.version.cuda} but reaches no GPU: compare the driver's version in `nvidia-smi`"
        return Finding("broken", text, [cure], facts)
    if threads > usable:
        cure = f"torch takes {threads} threads for {usable:g} cores, which is slow: OMP_NUM_THREADS={max(1, int(usable))}"
        return Finding("warning", text, [cure], facts)
    return Finding("ok", text, [], facts)


def plugins() -> Finding:
    """What recipes can name, and which plugins are broken, with the reason."""
    from ssl_ae.registry import Registry

    registry = Registry.discover()
    broken = [plugin for plugin in registry.plugins.values() if plugin.status == "broken"]
    loaded = [f"{plugin.name} ({plugin.origin})" for plugin in registry.plugins.values() if plugin.status == "loaded"]
    off = sum(plugin.status == "disabled" for plugin in registry.plugins.values())
    text = f"{listing(loaded, 'and')}: {len(registry.entries)} components{f'; {off} disabled' if off else ''}"
    cures = [f"plugin {plugin.name} ({plugin.origin}) is broken: {plugin.reason}" for plugin in broken]
    facts = {plugin.name: {"status": plugin.status, "reason": plugin.reason} for plugin in registry.plugins.values()}
    return Finding("broken" if broken else "ok", text, cures, {"plugins": facts, "components": len(registry.entries)})


def store() -> Finding:
    """Whether MLflow's store answers, without importing mlflow: that takes 3 s, and its client waits for minutes."""
    from ssl_ae.tracking import Unreachable, live_store, reach
    from ssl_ae.tracking.store import without_password

    uri = live_store()
    if uri is None:
        return Finding("ok", "everything stays in the journal until `ssl-ae track sync` (SSL_AE_TRACKING=journal)")
    facts = {"uri": without_password(uri)}
    try:
        return Finding("ok", f"{without_password(uri)}: {reach(uri, STORE_PATIENCE_SECONDS)}", [], facts)
    except Unreachable as error:
        cure = "runs go on without it and lose nothing; `ssl-ae track sync RUN` delivers once it answers"
        return Finding("broken", f"{without_password(uri)} does not answer: {error}", [cure], facts)


def disk() -> Finding:
    """Room to write here, where runs go, and in the temporary folder."""
    texts, cures, facts, status = [], [], {}, "ok"
    seen: set[int] = set()
    for folder in (Path.cwd(), Path.cwd() / "runs", Path(tempfile.gettempdir())):
        if not folder.exists() or folder.stat().st_dev in seen:  # one disk is told once
            continue
        seen.add(folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        facts[str(folder)] = free
        texts.append(f"{free / GB:,.1f} GB free in {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            status = "broken"
            cures.append(f"{folder} is not writable: change its permissions, or work in another folder")
        elif free < LITTLE_FREE:
            status = "broken" if free < LEAST_FREE or status == "broken" else "warning"
            cures.append(f"{folder} is nearly full: a run that finds no room stops, and goes on once there is some")
    return Finding(status, "; ".join(texts), cures, {"free_bytes": facts})


def self_test() -> Finding:
    """A tiny training on this machine's device, stopped and resumed, and a head on its codes."""
    import torch

    from ssl_ae.doctor.trial import run_trial

    started, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second, and wait for it where its core is shared
    try:
        trial: Trial = run_trial()
    finally:
        torch.set_num_threads(threads)
    seconds = time.monotonic() - started
    text = (
        f"{trial.steps} steps on {trial.device}: loss {trial.first_loss:.1f} to {trial.last_loss:.1f} nats; stopped and resumed "
        f"{'gives the same bits' if trial.same_bits else 'gives OTHER bits'}; a head on {trial.labels} labels is right on "
        f"{trial.accuracy:.0%} of {trial.classes} classes; {seconds:.1f} s"
    )
    cures = []
    if not trial.last_loss < 0.95 * trial.first_loss:
        cures.append("the loss does not fall: this build of torch computes something else on this device; try device: cpu")
    if not trial.same_bits:
        cures.append(
            f"a resumed run differs from one never stopped on {trial.device}: try device: cpu, and tell us both versions"
        )
    if not trial.accuracy > 3 / trial.classes:
        cures.append("the head does not learn: this build of torch computes something else on this device; try device: cpu")
    facts = {**vars(trial), "seconds": seconds}
    return Finding("broken" if cures else "ok", text, cures, facts)


def report_of(findings: dict[str, Finding]) -> dict[str, Any]:
    """What `--json` adds to the common fields."""
    checks = {name: {"status": f.status, "text": f.text, "cures": f.cures, "facts": f.facts} for name, f in findings.items()}
    return {"healthy": not broken_ones(findings), "executable": sys.executable, "checks": checks}


def broken_ones(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.status == "broken"]
