"""What a benchmark row is made of, and how its sides are timed: in turns, on one core, in processor time."""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Literal

TURN_SECONDS = 0.3  # of one side's turn: far above the clock's grain, short enough that a busy neighbour troubles all sides alike
ROUNDS = 9

Work = Callable[[], float | None]  # does the work once; may return the processor seconds that count, where not all of them do


@dataclass(frozen=True)
class Side:
    """Someone who does a row's work."""

    work: Work
    amount: float = 1  # steps, rows, ... that one call does


@dataclass(frozen=True)
class Missing:
    """A side that cannot run here, and why."""

    reason: str


@dataclass(frozen=True)
class Bar:
    """What a row promises: ours takes at most `factor` times what `side` takes, or does `at_least` so many a second."""

    side: str  # "ours" where the promise is a rate
    factor: float = 1.0
    at_least: float | None = None


@dataclass(frozen=True)
class Row:
    """One piece of work, done by us, by peers, and by what no implementation can leave out."""

    metric: str
    unit: Literal["ms", "s", "rows/s"]  # of one step, row, ...: time, or how many a second
    sides: Mapping[str, Side | Missing]  # "ours" and "limit" have fixed names
    bars: tuple[Bar, ...] = ()
    note: str = ""
    rounds: int | None = None  # for work of many seconds: so few turns, of one call each, without one that warms up


@dataclass(frozen=True)
class Timed:
    """A row with the processor seconds that each side took for one step, row, ...: one number a round."""

    metric: str
    unit: str
    seconds: dict[str, list[float]]
    skipped: dict[str, str] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    note: str = ""

    def shown(self, side: str) -> str:
        if side not in self.seconds:
            return "-"
        each = statistics.median(self.seconds[side])
        return {"ms": f"{1e3 * each:.2f} ms", "s": f"{each:.2f} s", "rows/s": f"{1 / each:,.0f} rows/s"}[self.unit]

    def ratio(self, side: str) -> tuple[float, float]:
        """Ours over the side's, of the same round: median, and half the distance between the quartiles."""
        pairs = sorted(ours / other for ours, other in zip(self.seconds["ours"], self.seconds[side], strict=True))
        low, middle, high = statistics.quantiles(pairs, n=4)
        return middle, (high - low) / 2

    def as_dict(self) -> dict:
        ratios = {side: self.ratio(side) for side in self.seconds if side != "ours" and "ours" in self.seconds}
        return {**asdict(self), "ratios": ratios}

    @classmethod
    def from_dict(cls, found: dict) -> Timed:
        return cls(**{**found, "bars": tuple(Bar(**bar) for bar in found["bars"])})


def pin() -> None:
    """Keep the process on one core with one thread. Before torch is imported: its pool is made once."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    if "sched_setaffinity" in dir(os):  # Linux only
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def spent() -> float:
    """Processor seconds, user and system, of this process and of those it waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in each)


def timed(row: Row, rounds: int = ROUNDS) -> Timed:
    """Every side in turn, `rounds` times: what slows the machine meanwhile slows them all."""
    sides = {name: side for name, side in row.sides.items() if isinstance(side, Side)}
    calls = {name: 1 if row.rounds else _calls(side) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(row.rounds or rounds):
        for name, side in sides.items():
            seconds[name].append(_turn(side, calls[name]))
    skipped = {name: side.reason for name, side in row.sides.items() if isinstance(side, Missing)}
    return Timed(row.metric, row.unit, seconds, skipped, row.bars, row.note)


def _turn(side: Side, calls: int) -> float:
    """Processor seconds of one step, row, ..., over so many calls."""
    before = spent()
    told = [side.work() for _ in range(calls)]
    seconds = spent() - before if told[0] is None else sum(told)
    return seconds / (calls * side.amount)


def _calls(side: Side) -> int:
    """How many calls fill a turn; the first is left out, because it warms up."""
    side.work()
    before = spent()
    side.work()
    return max(1, round(TURN_SECONDS / max(spent() - before, 1e-6)))


def peer(distribution: str, make: Callable[[], Side]) -> dict[str, Side | Missing]:
    """A side by the name of an installed distribution, or why it is skipped."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return {distribution: Missing(f"{distribution} is not installed")}
    return {f"{distribution} {version}": make()}


def why_no_bf16() -> str:
    """Why rows in bf16 are skipped here, or nothing: where the processor only emulates it, it says nothing about speed."""
    import torch

    from ssl_ae.distributed import computes_bf16

    if computes_bf16(torch.device("cpu")):
        return ""
    return "this processor has no native bf16 (avx512_bf16 or amx_bf16)"


def table(rows: Iterable[Timed]) -> str:
    """Markdown: a line for each peer of a row."""
    lines = ["| work | ours | peer | limit | ours / peer | ours / limit | bar |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peers = [side for side in (*row.seconds, *row.skipped) if side not in ("ours", "limit")] or ["-"]
        if "ours" not in row.seconds:
            lines.append(f"| {row.metric} | skipped: {row.skipped.get('ours', row.note)} | | | | | |")
            continue
        for name in peers:
            shown = f"{name}: skipped, {row.skipped[name]}" if name in row.skipped else f"{name}: {row.shown(name)}"
            against = [_ratio(row, side) for side in (name, "limit")]
            bars = "; ".join(_bar(row, bar) for bar in row.bars if bar.side in ("ours", "limit") or name.startswith(bar.side))
            cells = [row.metric, row.shown("ours"), shown.replace("-: -", "-"), row.shown("limit"), *against, bars]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(row: Timed, side: str) -> str:
    if side not in row.seconds:
        return "-"
    middle, spread = row.ratio(side)
    digits = 2 if middle >= 0.1 else 4
    return f"{middle:.{digits}f} ± {spread:.{digits}f}"


def _bar(row: Timed, bar: Bar) -> str:
    side = next((name for name in row.seconds if name.startswith(bar.side)), None)
    if side is None:
        return ""
    if bar.at_least is not None:
        met = 1 / statistics.median(row.seconds[side]) >= bar.at_least
        return f"at least {bar.at_least:,.0f} a second: {'met' if met else 'NOT met'}"
    return f"{bar.side} <= {bar.factor:.3g}: {'met' if row.ratio(side)[0] <= bar.factor else 'NOT met'}"
