"""How fast ssl-ae is, beside what people use today and beside the limit of the hardware.

    make bench
    python -m tests.benchmarks.bench                  every row
    python -m tests.benchmarks.bench vae_step start   some of them
    python -m tests.benchmarks.bench --json FILE      also every measurement

Each row is a file of tests/benchmarks/rows and runs in a process of its own, pinned to one core, with one thread. Its sides
take turns (A B C A B C ...), so that a busy machine troubles them alike; a turn is counted in processor time, user and
system. The table shows medians, and ratios as the median over rounds ± half the distance between the quartiles. Peers run
where they are installed: pip install -e '.[bench]' and, because its pins are old, pip install --no-deps pythae==0.1.2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import kit, rows


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(rows.__path__))


def measured_here(name: str, rounds: int) -> list[kit.Timed]:
    """The rows of one file, measured in this process."""
    kit.pin()
    module = importlib.import_module(f"{rows.__name__}.{name}")
    return [kit.timed(row, rounds) for row in module.rows()]


def measured(name: str, rounds: int) -> list[kit.Timed]:
    """The rows of one file, measured in a fresh process: nothing that another row warmed or spoilt."""
    command = [sys.executable, "-m", "tests.benchmarks.bench", "--alone", name, "--rounds", str(rounds)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [kit.Timed.from_dict(row) for row in json.loads(found.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(names())}; all by default")
    parser.add_argument("--rounds", type=int, default=kit.ROUNDS, help="turns of each side, at least 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--alone", metavar="ROW", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := sorted({*given.rows} - {*names()}):
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(names())}")
    if given.alone:
        found = measured_here(given.alone, given.rounds)
        print(json.dumps([{key: value for key, value in row.as_dict().items() if key != "ratios"} for row in found]))
        return
    done: list[kit.Timed] = []
    for name in given.rows or names():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        done += measured(name, max(5, given.rounds))
    if given.json:
        given.json.write_text(json.dumps([row.as_dict() for row in done], indent=1) + "\n")
    print(kit.table(done))


if __name__ == "__main__":
    main()
