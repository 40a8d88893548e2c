"""A store that fails in every way while the real command trains: the same weights, in the same time, and every metric later."""

import contextlib
import json
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Answer, call, start, with_fields, write_yaml
from conftest import TINY
from faults.tracking_kit import Gate, mlflow_server

from ssl_ae.tracking.journal import rank_files, read_events

EPOCHS = 250  # of 11 steps: some 10 s of training, so that the courier sets out while it lasts
FAILED, DELIVERED = "failed", "delivered"  # events after which the gate changes: it failed a request; the store has some metrics
PLANS = {
    "healthy": ["open"],
    "refused": ["shut"],
    "hung": ["hung"],
    "500 for a while": ["500", FAILED, "open"],
    "500 for ever": ["500"],
    "hangs in the middle": ["open", DELIVERED, "hung", FAILED, "open"],
    "hangs in the middle for ever": ["open", DELIVERED, "hung"],
}


@dataclass(frozen=True)
class Trained:
    """One run of the command."""

    answer: Answer
    weights: bytes
    cpu_seconds: float
    seconds_a_step: float
    metrics: dict


def train(folder: Path, gate: Gate | None = None, plan: Sequence[str] = ()) -> Trained:
    """`ssl-ae pretrain` in a folder, while the gate goes through its plan."""
    environment = {"SSL_AE_TRACKING": "live", "MLFLOW_TRACKING_URI": gate.address} if gate else {"SSL_AE_TRACKING": "journal"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    over = threading.Event()
    guard = threading.Thread(target=follow, args=[folder, gate, plan, over])
    guard.start()
    with start("pretrain", "recipe.yaml", "--out", folder, "--json", **environment) as process:
        stdout, stderr = process.communicate(timeout=400)
    over.set()
    guard.join()
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


def follow(folder: Path, gate: Gate | None, plan: Sequence[str], over: threading.Event) -> None:
    """Let the gate go through its plan until that or the command is over."""
    happened = {FAILED: lambda: gate.failed > 0, DELIVERED: (folder / "pretrain" / "mlflow_run_id").exists}
    for word in plan:
        if word not in happened:
            gate.state = word
        while word in happened and not happened[word]():
            if over.wait(0.01):
                return


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
    with mlflow_server(tmp_path_factory.mktemp("server")) as (port, _):
        yield port


@pytest.fixture(scope="module")
def alone(tmp_path_factory, digits):
    """The same training without a store, made again beside each of the others, because the machine's speed drifts."""
    folder = tmp_path_factory.mktemp("alone")
    fields = {"data.path": str(digits), "pretrain.epochs": EPOCHS, "pretrain.log_every": 1}
    write_yaml(folder / "recipe.yaml", with_fields(TINY, fields))
    trained: list[Trained] = []

    def again() -> list[Trained]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            trained.append(train(folder / f"run-{len(trained)}"))
        return trained

    again()
    return again


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PLANS)
def test_a_store_that_fails_costs_nothing_and_misses_nothing(backend, alone, here, digits, monkeypatch, record_property, name):
    from mlflow import MlflowClient

    fields = {"data.path": str(digits), "pretrain.epochs": EPOCHS, "pretrain.log_every": 1}
    write_yaml(here / "recipe.yaml", with_fields(TINY, fields))
    with contextlib.closing(Gate(backend)) as gate:
        found = train(here / "run", gate, PLANS[name])
        *_, before, after = alone()
        warnings = found.answer.json["warnings"]  # so it left with 0, and one line on stdout
        assert found.answer.stderr.count("warning: ") == len(warnings)
        assert found.weights == after.weights
        assert found.metrics == after.metrics
        assert len(warnings) == (name == "refused" or gate.failed > 0)
        assert all(f"ssl-ae track sync {here / 'run'}" in warning for warning in warnings)
        gate.state = "open"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.address)
        report = call("track", "sync", here / "run", "--json").json["delivered"]
        client = MlflowClient(gate.address)
        run_id = report["stages"]["pretrain"]["run_id"]
        assert stored(client, run_id) == found.metrics
        assert client.get_run(run_id).info.status == "FINISHED"
    cpu = (before.cpu_seconds + after.cpu_seconds) / 2
    step = found.seconds_a_step / (before.seconds_a_step / 2 + after.seconds_a_step / 2)
    record_property("cost", f"processor time {found.cpu_seconds - cpu:+.2f} s of {cpu:.1f}, time a step {step:.3f}")
    print(f"{name}: {found.cpu_seconds - cpu:+.2f} s of {cpu:.1f}, time a step {step:.3f}, failed {gate.failed}")
    assert step < 2  # a store that blocks would cost seconds a step
