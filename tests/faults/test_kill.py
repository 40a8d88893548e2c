"""SIGKILL at random moments: the same command, given again, ends with the bits of a job that nobody killed.

`make test-faults` kills 200 times, over every stage, on one rank and on two: sometimes the whole process group, as a machine
that dies does, and sometimes one rank, which the other has to notice.
"""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from command_line import snapshot, with_fields, write_yaml
from conftest import TINY
from faults.kill_kit import Campaign, Server, Steps, serving, steps_seen, streams

from ssl_ae.tracking.journal import rank_files, read_events

ROWS = 40_000  # of which 36,000 are train rows: three parts of Parquet
LABELS = 200
LASTING = ("journal", "checkpoint", "mlflow_run_id", ".lock")  # what tells of the attempts, not of what was made
JOBS = {  # of each, what it needs done before, and its words
    "pretrain": ((), ("pretrain", "recipe.yaml")),
    "extract": (("pretrain",), ("extract", "run", "--scores")),
    "head": (("pretrain", "extract"), ("finetune", "recipe.yaml", "--sequential")),
    "joint": (("pretrain",), ("finetune", "recipe.yaml", "--joint")),
    "run": ((), ("run", "recipe.yaml")),
}
SLOW = [(job, ranks) for job in JOBS for ranks in (1, 2)]
KILLS_OF_EACH = 20  # of which there are ten


@dataclass
class Job:
    """A job, and what it makes and sees when nobody kills it."""

    server: Server
    folder: Path  # holds the recipe and one folder for each attempt at the job
    name: str
    ranks: int
    seconds: float = 0.0
    made: dict[str, str] = field(default_factory=dict)
    seen: Steps = field(default_factory=dict)
    measured: dict = field(default_factory=dict)
    tried: int = 0

    def __post_init__(self) -> None:
        campaign = self.begin("uninterrupted")
        self.seconds = campaign.end().seconds
        self.made, self.seen = made(campaign.folder / "run"), steps_seen(campaign.witness)
        self.measured = measured(campaign.folder / "run")

    def begin(self, name: str) -> Campaign:
        """A folder of its own, with what the job needs in it."""
        place = self.folder / name
        place.mkdir()
        shutil.copy(self.folder / "recipe.yaml", place)
        before, words = JOBS[self.name]
        for needed in before:
            if not (ready := self.folder / f"ready-{needed}").exists():
                others = JOBS[needed][1]
                Campaign(self.server, place, (*others, *out_of(others))).end()
                shutil.copytree(place / "run", ready)
            shutil.rmtree(place / "run", ignore_errors=True)
            shutil.copytree(ready, place / "run")
        witness = place / "witness"
        witness.mkdir()
        return Campaign(self.server, place, (*words, *out_of(words)), self.ranks, witness)

    def survives(self, kills: int, chance: random.Random) -> None:
        """Be killed so often, as many times over as that takes; each time the end is the uninterrupted one."""
        turn = 0
        while self.tried < kills:
            campaign = self.begin(f"killed-{turn}")
            if not campaign.kill(min(kills - self.tried, 8), self.seconds, chance):
                campaign.end()
            self.tried += campaign.tried
            turn += 1
            check(self, campaign)
            shutil.rmtree(campaign.folder)


def out_of(words: tuple[str, ...]) -> tuple[str, ...]:
    return () if words[0] == "extract" else ("--out", "run")


def made(run: Path) -> dict[str, str]:
    """Everything that a run made, by its sha256."""
    return {name: digest for name, digest in snapshot(run).items() if not set(Path(name).parts) & set(LASTING)}


def measured(run: Path) -> dict:
    """{(stage, step): {metric: value}} from the journals; whoever measured a step again must have found the same."""
    found: dict = {}
    for journal in sorted({path.parent for path in run.rglob("rank-0.jsonl")}):
        stage = journal.parent.relative_to(run).as_posix()
        for path in rank_files(journal.parent):
            events = [event for event, _ in read_events(path)]
            assert None not in events, f"{path} holds a line that cannot be read"
            for event in events:
                if event["event"] == "metrics":
                    at = found.setdefault((stage, event["step"]), {})
                    for name, value in event["values"].items():
                        if not name.startswith("system/"):
                            assert at.setdefault(name, value) == value, (stage, event["step"], name)
    return {place: values for place, values in found.items() if values}


def check(job: Job, campaign: Campaign) -> None:
    run = campaign.folder / "run"
    assert made(run) == job.made, "\n".join(campaign.told)
    seen = steps_seen(campaign.witness)
    assert seen == job.seen
    assert measured(run) == job.measured
    for (phase, kind), rows in streams(seen, job.ranks).items():
        distinct = sorted(set(rows))
        for start in range(0, len(rows) - len(distinct) + 1, max(1, len(distinct))):
            assert sorted(rows[start : start + len(distinct)]) == distinct, f"{phase}, {kind}: an epoch with a row twice"
    for table in run.glob("latents/*/_manifest.json"):
        keys = pyarrow.dataset.dataset(table.parent).to_table(["key"])["key"].to_pylist()
        assert len(keys) == len(set(keys)) == json.loads(table.read_text())["rows"]


def prepare(server: Server, folder: Path, x: np.ndarray, y: np.ndarray, fields: dict) -> Path:
    """Samples, packed, and a recipe for them."""
    np.savez(folder / "x.npz", x=x, y=y)
    assert server.run(folder, "data", "pack", "x.npz", "vectors").codes == [0]
    joint = {"stage": "finetune", "set": {"finetune.mode": "joint"}}
    usual = {
        "data.path": str(folder / "vectors"),
        "data.labels": {"total": LABELS},
        "model.latent_dim": 2,  # is its own map
        "model.encoder.widths": [7],
        "model.decoder.likelihood": "gaussian",
        "finetune.alpha": 0.1,
        "stages": ["pretrain", "extract", "finetune", joint, "evaluate"],
    }
    write_yaml(folder / "recipe.yaml", with_fields(TINY, usual | fields))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def prepared(server, tmp_path_factory) -> Path:
    """Many small vectors of two classes."""
    training = {"epochs": 4, "batch_size": 1_024, "log_every": 10}
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, ROWS)
    x = (rng.normal(size=(ROWS, 3)) + y[:, None]).astype(np.float32)
    return prepare(server, tmp_path_factory.mktemp("kill"), x, y, {"pretrain": training, "finetune": dict(training)})


def test_a_few_kills(server, tmp_path):
    """In the third epoch of four, when the first is surely saved, in the last, and at a random moment."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2_003, 1, 4, 4), dtype=np.uint8), rng.integers(0, 2, 2_003)  # whose pictures are quickly drawn
    fields = {"model.decoder.likelihood": "bernoulli", "pretrain": {"epochs": 4, "batch_size": 128, "log_every": 3}}
    job = Job(server, prepare(server, tmp_path, x, y, fields), "pretrain", 1)
    campaign = job.begin("killed")
    for step in (40, 50):  # of 57: an epoch has 1,803 / 128 steps
        campaign.kill_at(step)
    campaign.kill(1, job.seconds, random.Random(7))
    campaign.end()
    assert "resuming pretrain at step " in campaign.told[1]
    check(job, campaign)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize(("name", "ranks"), SLOW)
def test_many_kills(server, prepared, tmp_path, name, ranks, record_property):
    for needed in ("recipe.yaml", *[ready.name for ready in prepared.glob("ready-*")]):
        source = prepared / needed
        shutil.copytree(source, tmp_path / needed) if source.is_dir() else shutil.copy(source, tmp_path)
    job = Job(server, tmp_path, name, ranks)
    for ready in tmp_path.glob("ready-*"):
        if not (prepared / ready.name).exists():
            shutil.copytree(ready, prepared / ready.name)
    job.survives(KILLS_OF_EACH, random.Random(f"{name} on {ranks}"))
    record_property("kills", job.tried)
