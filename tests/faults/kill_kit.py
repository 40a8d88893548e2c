"""The real command, killed at any moment, hundreds of times in minutes.

Importing torch takes seconds a process, so a server that has imported everything, and has started no thread, forks a process
for each command (for each rank of it) and kills it by SIGKILL from outside. `python kill_kit.py` is that server: one JSON
object a line, asked on stdin and answered on stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITNESS = "SSL_AE_TEST_WITNESS"  # the folder where each rank writes down the rows of each step before it makes it
KILL_AT = "SSL_AE_TEST_KILL_AT"  # the step before which the process dies by SIGKILL
PATIENCE_SECONDS = 30.0  # that a rank may take to notice that another one died


@dataclass(frozen=True)
class Ended:
    """How a command ended, by rank: exit codes, or the number of the signal, negative."""

    codes: list[int]
    seconds: float
    stdout: str
    stderr: str

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes


class Server:
    """Runs commands, each in new processes of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SSL_AE_TRACKING": "journal"}
        environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # importing pyarrow starts one
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        folder: Path,
        *words: object,
        ranks: int = 1,
        witness: Path | None = None,
        kill_after: float | None = None,
        victim: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """`ssl-ae WORDS` in a folder; after so many seconds its process group is killed, or one rank of it and then the rest."""
        added = (environment or {}) | ({WITNESS: str(witness)} if witness else {})
        asked = {"folder": str(folder), "words": [str(word) for word in words], "ranks": ranks, "environment": added}
        with tempfile.TemporaryDirectory() as told:
            asked |= {"kill_after": kill_after, "victim": victim, "told": told}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            texts = {
                name: "".join(path.read_text() for path in sorted(Path(told).glob(f"*.{name}"))) for name in ("stdout", "stderr")
            }
        return Ended(**answer, **texts)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


@dataclass
class Campaign:
    """One job that is killed until it has been killed `kills` times, and then left to end."""

    server: Server
    folder: Path  # the current folder of the command
    words: tuple[object, ...]
    ranks: int = 1
    witness: Path | None = None
    tried: int = 0  # kills that met a living process
    told: list[str] = field(default_factory=list)  # stderr of every attempt

    def kill(self, kills: int, seconds: float, chance: random.Random) -> bool:
        """Kill `kills` times, each uniformly within `seconds`; True when the job was done before that."""
        for _ in range(kills):
            victim = chance.choice([None, chance.randrange(self.ranks)]) if self.ranks > 1 else None
            ended = self._run(kill_after=chance.uniform(0, seconds), victim=victim)
            if not ended.killed:
                assert ended.codes == [0] * self.ranks, ended
                return True
            self.tried += 1
            # 1 is a rank that lost the other, 0 one that needed it no more
            assert set(ended.codes) <= {-signal.SIGKILL, 0, 1}, ended
            if ended.stdout:  # it was done, and killed while it said so
                return True
        return False

    def kill_at(self, step: int) -> None:
        """Kill one rank before it makes this step."""
        ended = self._run(environment={KILL_AT: str(step)})
        assert ended.codes == [-signal.SIGKILL], ended
        self.tried += 1

    def end(self) -> Ended:
        """The same command, left alone."""
        ended = self._run()
        assert ended.codes == [0] * self.ranks, "\n".join([*self.told, str(ended)])
        return ended

    def _run(self, **how: object) -> Ended:
        ended = self.server.run(self.folder, *self.words, ranks=self.ranks, witness=self.witness, **how)
        self.told.append(ended.stderr)
        return ended


Steps = dict[tuple[str, int, int], tuple[list[int], list[int]]]  # (phase, step, rank): rows drawn uniformly, further rows


def steps_seen(witness: Path) -> Steps:
    """What every step of every attempt saw; a step that was made again must have seen the same."""
    seen: Steps = {}
    for path in sorted(witness.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            phase, step, rank, uniform, further = json.loads(line)
            assert seen.setdefault((phase, step, rank), (uniform, further)) == (uniform, further), (phase, step, rank)
    return seen


def streams(seen: Steps, ranks: int) -> dict[tuple[str, str], list[int]]:
    """The rows in the order in which a phase draws them over all ranks: (phase, uniform | labelled)."""
    found: dict[tuple[str, str], list[int]] = {}
    for phase in dict.fromkeys(phase for phase, _, _ in seen):
        steps = sorted({step for name, step, _ in seen if name == phase})
        assert steps == list(range(len(steps))), f"{phase} left out a step"
        for step in steps:
            shares = [seen[phase, step, rank] for rank in range(ranks)]
            for kind, parts in (("uniform", [u for u, _ in shares]), ("labelled", [f for _, f in reversed(shares)])):
                found.setdefault((phase, kind), []).extend(interleaved(parts))
    return found


def interleaved(parts: list[list[int]]) -> list[int]:
    """The batch of which rank r took every world-th row from the r-th on."""
    batch = [0] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        batch[rank :: len(parts)] = part
    return batch


def serve() -> None:
    observe_steps()
    for line in sys.stdin:
        asked = json.loads(line)
        import_what_stages_need(asked["ranks"])
        if os.path.isdir(tasks := "/proc/self/task"):
            assert len(os.listdir(tasks)) == 1, "a process with threads cannot be forked"
        sys.stdout.write(json.dumps(attempt(asked)) + "\n")
        sys.stdout.flush()


def import_what_stages_need(ranks: int) -> None:
    for module in ("matplotlib.backends.backend_agg", "sklearn.linear_model", "ssl_ae.figures", "ssl_ae.stages.pipeline"):
        importlib.import_module(module)
    if ranks > 1:
        importlib.import_module("torch._dynamo")  # by DistributedDataParallel
    from ssl_ae.registry import Registry

    Registry.discover()


def observe_steps() -> None:
    """Let every step write down, before it is made, which rows it sees."""
    from ssl_ae import distributed
    from ssl_ae.stepping import Stepper

    make = Stepper.make

    def witnessed(self, run, batches, step):
        if folder := os.environ.get(WITNESS):
            rank = distributed.rank()
            uniform = [row for batch in batches for row in batch.row[batch.uniform].tolist()]
            further = [row for batch in batches for row in batch.row[~batch.uniform].tolist()]
            # a stage trains more or fewer parameters than another in a phase of the same name
            line = json.dumps([f"{run.phase.name} of {len(run.parameters)}", step, rank, uniform, further]) + "\n"
            place = os.open(Path(folder) / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(place, line.encode())
            os.close(place)
        if os.environ.get(KILL_AT) == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        make(self, run, batches, step)

    Stepper.make = witnessed


def attempt(asked: dict) -> dict:
    """Fork the ranks, kill them when it is time, and wait for their end."""
    ranks, environment = asked["ranks"], asked["environment"]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    started = time.monotonic()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            ids = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            command(asked, environment | ids, f"{asked['told']}/{rank}")
        children.append(child)
    codes: dict[int, int] = {}
    if asked["kill_after"] is not None:
        collect(children, codes, started + asked["kill_after"])
        kill([children[asked["victim"]]] if asked["victim"] is not None else children, codes)
        collect(children, codes, time.monotonic() + PATIENCE_SECONDS)
        kill(children, codes)
    collect(children, codes, None)
    return {"codes": [codes[child] for child in children], "seconds": time.monotonic() - started}


def command(asked: dict, environment: dict[str, str], told: str) -> None:
    """Become `ssl-ae WORDS`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        place = os.open(f"{told}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(place, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["folder"])
    os.environ |= environment
    sys.argv = ["ssl-ae", *asked["words"]]
    from ssl_ae.cli import main

    main()
    raise SystemExit


def kill(children: list[int], codes: dict[int, int]) -> None:
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)


def collect(children: list[int], codes: dict[int, int], until: float | None) -> None:
    """Wait for the children, until a time at most."""
    for child in children:
        while child not in codes:
            ended, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= until:
                return
            else:
                time.sleep(0.002)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
