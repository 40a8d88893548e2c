"""What a label curve says: each method's mean and deviation, and what it wins over the controls, draw by draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_ae.comparing import SURE, Paired, paired
from ssl_ae.errors import listing
from ssl_ae.stages.baselines import NETWORKS
from ssl_ae.stages.scoring import HEADLINE, better

Row = dict[str, Any]  # labels, seed, method, and a number of each figure of merit


@dataclass(frozen=True)
class Comparison:
    """A method beside a control on the same draws of `labels` labels; differences are those of the headline figure."""

    labels: int
    method: str
    control: str
    ours: float  # means over the draws
    theirs: float
    difference: Paired
    better: bool  # on average
    helped: bool  # and by more than chance, where there are draws enough to tell


@dataclass(frozen=True)
class Report:
    """The cells that are finished, of methods and controls in their order."""

    rows: Sequence[Row]
    methods: Sequence[str]
    controls: Sequence[str]
    task: str
    about: Mapping[str, str] = field(default_factory=dict)  # what a control is, by name

    @property
    def figure(self) -> str:
        """The figure of merit that is compared: accuracy, or rmse."""
        return HEADLINE[self.task]

    @property
    def labels(self) -> list[int]:
        return sorted({row["labels"] for row in self.rows})

    def values(self, method: str, labels: int, figure: str | None = None) -> dict[int, float]:
        """{seed: value}."""
        found = (row for row in self.rows if row["method"] == method and row["labels"] == labels)
        return {row["seed"]: row[figure or self.figure] for row in found}

    def means(self, figure: str | None = None) -> dict[str, dict[int, tuple[float, float, int]]]:
        """{method: {labels: (mean, deviation over draws, draws)}}; the deviation of one draw is NaN."""
        found: dict[str, dict[int, tuple[float, float, int]]] = {}
        for method in (*self.methods, *self.controls):
            of_method = {count: [*self.values(method, count, figure).values()] for count in self.labels}
            found[method] = {
                count: (statistics.fmean(some), statistics.stdev(some) if len(some) > 1 else float("nan"), len(some))
                for count, some in of_method.items()
                if some
            }
        return found

    def comparisons(self) -> Iterator[Comparison]:
        """Each method with the control that is best on average, and with the networks that saw no unlabelled row."""
        means = self.means()
        for count in self.labels:
            there = [name for name in self.controls if count in means[name]]
            if not there:
                continue
            best = there[0]
            for name in there[1:]:
                best = name if better(self.task, means[name][count][0], means[best][count][0]) else best
            rivals = [best, *(name for name in there if name in NETWORKS and name != best)]
            for method in self.methods:
                yield from (self._compared(method, rival, count) for rival in rivals if count in means[method])

    def _compared(self, method: str, control: str, labels: int) -> Comparison:
        ours, theirs = self.values(method, labels), self.values(control, labels)
        seeds = sorted(ours.keys() & theirs.keys())
        first, second = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
        difference = paired(first, second)
        mean = statistics.fmean(first), statistics.fmean(second)
        chance = difference.p >= SURE  # NaN, of one draw, is not
        ahead = better(self.task, *mean)
        return Comparison(labels, method, control, *mean, difference, ahead, ahead and not chance)

    def shown(self, value: float) -> str:
        """A headline figure, or a difference of two."""
        return f"{100 * value:.1f}" if self.figure == "accuracy" else f"{value:.4g}"

    def cell(self, found: tuple[float, float, int] | None) -> str:
        if found is None:
            return ""
        mean, deviation, draws = found
        return self.shown(mean) if draws == 1 else f"{self.shown(mean)} ± {self.shown(deviation)}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column names, and a line for each method: its figures, and the processor's seconds that a cell takes on average."""
        means, lines = self.means(), []
        for name in (*self.methods, *self.controls):
            if means[name]:
                shown = f"{name} (control)" if name in self.controls else name
                seconds = statistics.fmean(row["seconds"] for row in self.rows if row["method"] == name)
                lines.append([shown, *(self.cell(means[name].get(count)) for count in self.labels), f"{seconds:.1f}"])
        return ["method", *(f"{count:,} labels" for count in self.labels), "seconds a cell"], lines

    def compared_table(self, comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
        columns = ["labels", "method", "control", "difference", "sd", "standard error", "p", "pairs"]
        lines = []
        for c in comparisons:
            d = c.difference
            several = d.pairs > 1
            numbers = [self.shown(d.sd), self.shown(d.standard_error), f"{d.p:.2g}"] if several else ["", "", ""]
            lines.append([f"{c.labels:,}", c.method, c.control, self.signed(d.mean), *numbers, str(d.pairs)])
        return columns, lines

    def signed(self, value: float) -> str:
        return f"+{self.shown(value)}" if value >= 0 else self.shown(value)

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[str]:
        """One plain sentence for each method and control, where the method did not help, over the numbers of labels."""
        groups: dict[tuple[str, str, str], list[Comparison]] = {}
        for c in comparisons:
            if not c.helped:
                how = "better" if c.better else "worse" if c.difference.p < SURE else "no better"
                groups.setdefault((c.method, c.control, how), []).append(c)
        return [self._verdict(*names, some) for names, some in groups.items()]

    def _verdict(self, method: str, control: str, how: str, some: Sequence[Comparison]) -> str:
        at = f"{listing((f'{c.labels:,}' for c in some), 'and')} labels"
        without = "has seen no unlabelled data" if control in NETWORKS else "has no network"
        about = f"at {at} {method}"
        if control in NETWORKS:
            helped = "nothing shows that the unlabelled data helped" if how == "better" else "the unlabelled data did not help"
            about = f"{helped} {method} at {at}: it"
        unit = " %" if self.figure == "accuracy" else ""
        differences = listing((self._difference(c.difference) for c in some), "and")
        return (
            f"{about} is {how} than {control}, which {without}{', perhaps by chance' if how == 'better' else ''}: {self.figure} "
            f"{listing((self.shown(c.ours) for c in some), 'and')}{unit} against "
            f"{listing((self.shown(c.theirs) for c in some), 'and')}{unit}, difference {differences}."
        )

    def _difference(self, d: Paired) -> str:
        return self.signed(d.mean) + (f" ± {self.shown(d.standard_error)} (p = {d.p:.2g})" if d.pairs > 1 else "")

    def markdown(self, title: str, comparisons: Sequence[Comparison], notes: Sequence[str]) -> str:
        unit = " in %" if self.figure == "accuracy" else ""
        parts = [
            f"# {title}",
            f"{self.figure}{unit}, mean ± standard deviation over draws of the labels; a draw is the same for every method.",
            _markdown(*self.table()),
            "Controls: " + "; ".join(f"{name}: {self.about.get(name, '')}" for name in self.controls) + "."
            if self.controls
            else "",
            "Draw by draw: method less control, mean of the differences with their standard deviation, standard error of the "
            "mean, and two-sided p of the paired t-test.",
            _markdown(*self.compared_table(comparisons)),
            *(f"- {note}" for note in notes),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
