"""What a person sees while work goes on: bars on a terminal, plain lines elsewhere; always on stderr, stdout is for results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

WIDE = 10_000  # characters: rows of a table are not cut where no terminal limits them
LINES_EVERY_SECONDS = 10.0  # between two plain lines of one bar


class Reporter:
    """Speaks to the user. A silent one (ranks other than 0) takes the same calls and says nothing."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = WIDE
        self.silent = silent
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        if not self.silent:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if not self.silent:
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextlib.contextmanager
    def bar(self, description: str, total: int, unit: str = "rows") -> Iterator[Callable[[int, str], None]]:
        """Yield `advance(count, note)`. Shows how much is done, the speed in `unit` a second, and the time left."""
        if self.silent:
            yield lambda count, note="": None
        elif self.console.is_terminal:
            yield from self._live(description, total, unit)
        else:
            yield from self._lines(description, total, unit)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.silent:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", header_style="dim", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def _live(self, description: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(description, total=total, speed="", note="")
            started, done = time.monotonic(), 0

            def advance(count: int, note: str = "") -> None:
                nonlocal done
                done += count
                speed = done / max(1e-9, time.monotonic() - started)
                progress.update(task, advance=count, speed=f"{speed:,.0f} {unit}/s", **({"note": note} if note else {}))

            yield advance

    def _lines(self, description: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        started = last = time.monotonic()
        done = 0

        def advance(count: int, note: str = "") -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= LINES_EVERY_SECONDS:
                speed = done / (now - started)
                left = (total - done) / speed if speed else 0
                self.say(f"{description}: {done:,}/{total:,} {unit}, {speed:,.0f} {unit}/s, {left:,.0f} s left {note}".rstrip())
                last = now

        yield advance
