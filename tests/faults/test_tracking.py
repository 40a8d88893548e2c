"""A store that fails in every way while the real command trains: the same weights, in the same time, and every metric later."""

import json
import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Answer, call, start, with_fields, write_yaml
from conftest import TINY
from faults.tracking_kit import Gate, mlflow_server

from ssl_ae.tracking.journal import rank_files, read_events

EPOCHS = 250  # of 11 steps: about 10 s of training
PLANS = {  # (seconds since the command was started, state of the gate)
    "healthy": [(0, "open")],
    "refused": [(0, "shut")],
    "hung": [(0, "hung")],
    "500 for a while": [(0, "500"), (9, "open")],
    "500 for ever": [(0, "500")],
    "hangs in the middle": [(0, "open"), (8, "hung"), (11, "open")],
    "hangs in the middle for ever": [(0, "open"), (8, "hung")],
}
LOSING = set(PLANS) - {"healthy"}


@dataclass(frozen=True)
class Trained:
    """One run of the command."""

    answer: Answer
    weights: bytes
    cpu_seconds: float
    seconds_a_step: float
    metrics: dict


def train(folder: Path, gate: Gate | None, plan: list[tuple[float, str]]) -> Trained:
    """`ssl-ae pretrain` in a folder, while the gate goes through its plan."""
    environment = {"SSL_AE_TRACKING": "live", "MLFLOW_TRACKING_URI": gate.address} if gate else {"SSL_AE_TRACKING": "journal"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if gate:
        gate.state = plan[0][1]
    timers = [threading.Timer(after, setattr, [gate, "state", state]) for after, state in plan[1:]]
    for timer in timers:
        timer.start()
    with start("pretrain", "recipe.yaml", "--out", folder, "--json", **environment) as process:
        stdout, stderr = process.communicate(timeout=240)
    for timer in timers:
        timer.cancel()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stage = folder / "pretrain"
    (newest, *_) = sorted((stage / "checkpoint").glob("step-*"), reverse=True)
    progress = json.loads((newest / "progress.json").read_text())
    return Trained(
        Answer(process.returncode, stdout, stderr),
        (stage / "model.safetensors").read_bytes(),
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        progress["seconds"] / progress["step"],
        told(stage),
    )


def told(stage: Path) -> dict:
    """{(metric, step): value} that training told its journals."""
    events = [event for path in rank_files(stage) for event, _ in read_events(path)]
    return {
        (name, event["step"]): float(value)
        for event in events
        if event["event"] == "metrics"
        for name, value in event["values"].items()
        if not name.startswith("system/")
    }


def stored(client, run_id: str) -> dict:
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
    return {(name, metric.step): metric.value for name in names for metric in client.get_metric_history(run_id, name)}


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_fails_costs_nothing_and_misses_nothing(backend, here, digits, record_property):
    from mlflow import MlflowClient

    fields = {"data.path": str(digits), "pretrain.epochs": EPOCHS, "pretrain.log_every": 1}
    write_yaml(here / "recipe.yaml", with_fields(TINY, fields))
    alone = [train(here / "alone-0", None, [])]
    for number, (name, plan) in enumerate(PLANS.items()):
        gate = Gate(backend)
        run = here / f"run-{number}"
        found = train(run, gate, plan)
        warnings = [line for line in found.stderr.splitlines() if line.startswith("warning: ")]
        assert found.code == 0, (name, found.stderr)
        assert found.weights == alone[0].weights, name
        assert found.metrics == alone[0].metrics, name
        assert len(warnings) == (name in LOSING), (name, warnings)
        assert all(f"ssl-ae track sync {run}" in warning for warning in warnings)
        gate.state = "open"
        os.environ["MLFLOW_TRACKING_URI"] = gate.address  # of this test: `here` took the caller's away
        try:
            report = call("track", "sync", run, "--json").json["delivered"]
            client = MlflowClient(gate.address)
            run_id = report["stages"]["pretrain"]["run_id"]
            assert stored(client, run_id) == found.metrics, name
            assert client.get_run(run_id).info.status == "FINISHED"
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]
            gate.close()
        alone.append(train(here / f"alone-{number + 1}", None, []))  # in turns, because the machine's speed drifts
        base = [(each.cpu_seconds, each.seconds_a_step) for each in alone[-2:]]
        cpu, step = (sum(values) / 2 for values in zip(*base, strict=True))
        record_property(name, f"processor time {found.cpu_seconds - cpu:+.2f} s, time a step {found.seconds_a_step / step:.3f}")
        print(f"{name}: {found.cpu_seconds - cpu:+.2f} s of {cpu:.1f}, time a step {found.seconds_a_step / step:.3f}")
        assert found.seconds_a_step < 2 * step, name  # a store that blocks would cost seconds a step
