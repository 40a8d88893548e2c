"""label-curve: what every method, and every control, makes of few labels and of more, over several draws of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ae import distributed, files, tables
from ssl_ae.cores import usable_cores
from ssl_ae.data.labels import draw
from ssl_ae.errors import DataError, RecipeError, Stopped, listing
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Recipe, Stage, with_fields
from ssl_ae.registry import Registry
from ssl_ae.runs import StageFolder
from ssl_ae.stages.crew import work
from ssl_ae.stages.curve_cells import CELLS, Cell, cells_of, make
from ssl_ae.stages.curve_methods import (
    CONTROLS,
    Curve,
    Method,
    OfRecipe,
    components_of,
    controls_of,
    methods_of,
)
from ssl_ae.stages.curve_report import Report, Row
from ssl_ae.stages.extract import extract
from ssl_ae.stages.finetune import SPLITS as HEAD_SPLITS
from ssl_ae.stages.finetune import uses_pretrained
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.pipeline import check_all, own_fields, planned, run_stages
from ssl_ae.stages.scoring import HEADLINE
from ssl_ae.stages.workspace import Workspace, open_data, open_workspace
from ssl_ae.tracking import Tracker

NAME = "label_curve"
SPLITS = ("val", "test")
WRITE_EVERY_SECONDS = 10.0  # the table, while cells are made


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...] | None = None  # the recipe's own
    controls: bool = True
    split: str = "val"
    jobs: int | None = None  # one a core, or one a GPU
    restart: bool = False


def label_curve(recipe: Recipe, run: Path, source: str, reporter: Reporter, wanted: Wanted) -> Outcome:
    """One pretraining in `run`, then a cell for each method, number of labels and draw; table, figure and comparison.

    Raises RecipeError or DataError before anything is trained, and Stopped: the same command goes on.
    """
    registry, curve = Registry.discover(), Curve(recipe, run, source, wanted.split)
    with distributed.process_group(recipe.device):
        reporter.silent = reporter.silent or not distributed.is_main()
        methods = methods_of(recipe, wanted.methods, registry)
        controls = check(curve, methods, wanted, registry, reporter)
        extracted = pretrain_once(curve, methods, reporter, wanted.restart)
        with open_workspace(recipe, run, source, reporter, registry) as ws:
            if wanted.restart:
                start_over(run)
            if ws.pretrained.done and not extracted:
                extract(ws, HEAD_SPLITS)
            components_of(ws, run)
            cells = cells_of(curve, ws, [*methods, *controls], wanted.labels, wanted.seeds)
            return Making(curve, ws, methods, controls, cells).outcome(wanted)


def check(curve: Curve, methods: Sequence[OfRecipe], wanted: Wanted, registry: Registry, reporter: Reporter) -> list[Method]:
    """The controls that are wanted. Raises for whatever a cell would refuse after an hour."""
    data, resolved = open_data(curve.recipe, registry, curve.source, reporter)
    if data.card.y is None:
        raise DataError(f"{data.path} has no labels to draw from. Pack it with labels, or give `finetune` a file of them.")
    for method in methods:
        recipes = [with_fields(curve.recipe, stage.set, f"{curve.source}: stages") for stage in method.stages]
        check_all(list(method.stages), recipes, curve.source, Reporter(silent=True), registry)
    if own := own_fields(curve.recipe, "data.labels"):
        raise RecipeError(
            f"{curve.source}: stages: {own[0][0]} sets {own[0][1]}, and a label curve draws the labels itself. "
            "Remove it there, or run the recipe by `ssl-ae run`."
        )
    data.card.split(wanted.split)
    if not Labels(data.labels(wanted.split), None).count:
        raise DataError(f"no row of split {wanted.split!r} of {data.path} has a label, so nothing can be judged on it.")
    y, split = data.labels("train"), data.split("train")
    for seed in wanted.seeds:  # smaller draws are parts of the largest
        draw(y, split.keys, names=resolved.card.y.names, seed=seed, total=max(wanted.labels))
    few = [count for count in wanted.labels if y.ndim == 1 and count < len(resolved.card.y.names)]
    if few:
        reporter.warn(
            f"{listing(few, 'and')} labels for {len(resolved.card.y.names)} classes: some classes have no label in such a draw, "
            "and their samples will be taken for others."
        )
    return controls_of(resolved, registry, curve.source) if wanted.controls else []


def pretrain_once(curve: Curve, methods: Sequence[OfRecipe], reporter: Reporter, restart: bool) -> bool:
    """The stages of the recipe before the first that reads labels, in the run folder; pretraining too where a method needs it.

    Whether there was an extraction among them.
    """
    stages = list(takewhile(lambda stage: stage.stage in ("pretrain", "extract"), planned(curve.recipe)))
    finetunes = [stage for method in methods for stage in method.stages if stage.stage == "finetune"]
    if not stages and any(uses_pretrained(with_fields(curve.recipe, stage.set).finetune) for stage in finetunes):
        stages = [Stage(stage="pretrain")]
    if stages:
        chosen = curve.recipe.model_copy(update={"stages": tuple(stages)})
        run_stages(chosen, curve.run, curve.source, reporter, restart)
    return any(stage.stage == "extract" for stage in stages)


def start_over(run: Path) -> None:
    with distributed.main_first() as main:
        if main:
            for name in (CELLS, CONTROLS, NAME):
                files.remove_folder(run / name)


@dataclass
class Making:
    """The cells of a curve, and what is written of them."""

    curve: Curve
    ws: Workspace
    methods: Sequence[Method]
    controls: Sequence[Method]
    cells: Sequence[Cell]

    def __post_init__(self) -> None:
        found = {cell.fingerprint: cell.found(self.curve) for cell in self.cells}
        self.scores = {fingerprint: scores for fingerprint, scores in found.items() if scores is not None}
        self.rows_judged = Labels(self.ws.labels(self.curve.split), None).count
        self._written_at = time.monotonic()

    @property
    def table(self) -> Path:
        return self.curve.run / f"{NAME}.parquet"

    def outcome(self, wanted: Wanted) -> Outcome:
        stage = StageFolder(self.curve.run / NAME)
        there = distributed.from_main(len(self.scores))
        skipped = there == len(self.cells) and self.table.exists()
        if skipped:
            self.ws.reporter.say(f"label-curve: all {there:,} cells are made already")
            outputs, report = self.write(None)
        else:
            with self.ws.tracker(stage, "label-curve", ["train", self.curve.split]) as tracker:
                self.make_missing(wanted.jobs, tracker)
                outputs, report = self.write(tracker)
        comparisons = list(report.comparisons())
        return Outcome(
            "label-curve",
            self.curve.run,
            "skipped" if skipped else "done",
            outputs=outputs,
            metrics={
                f"{name}/labels-{count}/{report.figure}": found[0]
                for name, by_count in report.means().items()
                for count, found in by_count.items()
            },
            mlflow_run_id=stage.mlflow_run_id(),
            warnings=list(self.ws.reporter.warnings),
            more={
                "split": self.curve.split,
                "rows": self.rows_judged,
                "cells": len(self.cells),
                "methods": report.methods,
                "controls": report.controls,
                "comparisons": [asdict(comparison) for comparison in comparisons],
            },
        )

    def make_missing(self, jobs: int | None, tracker: Tracker) -> None:
        """Ranks share the cells; each has a world of its own to make them in."""
        missing = distributed.from_main([i for i, cell in enumerate(self.cells) if cell.fingerprint not in self.scores])
        mine = [self.cells[i] for i in missing[distributed.rank() :: distributed.world()]]
        workers, devices = self.workers(jobs, len(mine))
        self.ws.reporter.say(
            f"label-curve: {len(self.cells):,} cells, {len(missing):,} to make, {workers} at a time; "
            f"judged on {self.rows_judged:,} rows of {self.curve.split}"
        )
        with self.ws.reporter.bar("label-curve", len(mine), "cells") as advance:

            def done(cell: Cell, scores: dict[str, float]) -> None:
                self.scores[cell.fingerprint] = scores
                self.tell(cell, scores, tracker)
                figure = HEADLINE[self.ws.card.y.task]
                advance(1, f"{cell.method.name}, {cell.labels} labels, draw {cell.seed}: {figure} {scores[figure]:.4g}")
                if distributed.is_main() and time.monotonic() - self._written_at > WRITE_EVERY_SECONDS:
                    self.write_table()

            try:
                work(partial(make, self.curve), mine, workers, done, devices)
            except Stopped as stopped:
                made = sum(cell.found(self.curve) is not None for cell in self.cells)  # workers may have finished some more
                raise Stopped(
                    f"stopped; {made:,} of {len(self.cells):,} cells are made. Run the same command to go on."
                ) from stopped
        distributed.barrier()
        self.scores = {cell.fingerprint: cell.found(self.curve) for cell in self.cells}

    def workers(self, jobs: int | None, cells: int) -> tuple[int, list[str]]:
        """How many processes make cells at once, and which GPU each of them sees."""
        if self.ws.device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            visible = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
            several = distributed.world() > 1
            devices = [visible[self.ws.device.index]] if several else visible
            return jobs or len(devices), devices
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, min(jobs or max(1, int(usable_cores()) // local), cells)), []

    def tell(self, cell: Cell, scores: dict[str, float], tracker: Tracker) -> None:
        """A cell as metrics: the step is the number of labels, the draw is part of the name."""
        prefix = f"{self.curve.split}/{cell.method.name}"
        tracker.metrics({f"{prefix}/{name}/draw-{cell.seed}": value for name, value in scores.items()}, cell.labels)

    def report(self) -> Report:
        rows = [self.row(cell, self.scores[cell.fingerprint]) for cell in self.cells if cell.fingerprint in self.scores]
        names = [[method.name for method in some] for some in (self.methods, self.controls)]
        order = {name: i for i, name in enumerate(name for some in names for name in some)}
        rows.sort(key=lambda row: (order[row["method"]], row["labels"], row["seed"]))
        about = {control.name: control.about(self.ws.recipe) for control in self.controls}
        return Report(rows, *names, self.ws.card.y.task, about)

    def row(self, cell: Cell, scores: dict[str, float]) -> Row:
        facts = {"labels": cell.labels, "seed": cell.seed, "method": cell.method.name, "split": self.curve.split}
        return facts | {"rows": self.rows_judged} | scores

    def write_table(self) -> Report:
        report = self.report()
        if report.rows:
            names = list(report.rows[0])
            columns: dict[str, Any] = {name: [row[name] for row in report.rows] for name in names}
            text = ("method", "split")
            # a cell keeps a score that is not finite as null: the log-loss of a class that no label showed
            kept = {name: [np.nan if value is None else value for value in values] for name, values in columns.items()}
            arrays = {name: values if name in text else np.array(values) for name, values in kept.items()}
            tables.write_parquet(self.table, arrays, {"ssl_ae.recipe": self.ws.recipe.name, "ssl_ae.split": self.curve.split})
        self._written_at = time.monotonic()
        return report

    def write(self, tracker: Tracker | None) -> tuple[dict[str, Path], Report]:
        """Table, figure and text, to the user and to MLflow."""
        report = self.report()
        comparisons = list(report.comparisons())
        verdicts = report.verdicts(comparisons)
        outputs = {"table": self.table, "figure": self.table.with_suffix(".png"), "text": self.table.with_suffix(".md")}
        judged = f"judged on the {self.rows_judged:,} rows of {self.curve.split}"
        title = f"Label curve of {self.ws.recipe.name}"
        with distributed.main_first() as main:
            if main:
                self.write_table()
                draw_figure(report, outputs["figure"], title, judged)
                files.write_text(outputs["text"], report.markdown(f"{title}, {judged}", comparisons, verdicts))
                if tracker:
                    self.tell_means(report, tracker)
                    for path in outputs.values():
                        tracker.artifact(path)
        unit = " in %" if report.figure == "accuracy" else ""
        about = f"{report.figure}{unit} on {self.curve.split}, mean ± sd over draws of the labels"
        self.ws.reporter.table(about, *report.table())
        if comparisons:
            self.ws.reporter.table("draw by draw, method less control", *report.compared_table(comparisons))
        for verdict in verdicts:
            self.ws.reporter.warn(verdict)
        return outputs, report

    def tell_means(self, report: Report, tracker: Tracker) -> None:
        """Means and deviations over the draws as metrics: the step is the number of labels."""
        for name, by_count in report.means().items():
            for count, (mean, deviation, draws) in by_count.items():
                metric = f"{self.curve.split}/{name}/{report.figure}"
                tracker.metrics({metric: mean} | ({f"{metric}_sd": deviation} if draws > 1 else {}), count)


def draw_figure(report: Report, path: Path, title: str, detail: str) -> None:
    """Errors where there are classes: on a logarithmic axis they tell good methods apart, as accuracies near 1 do not."""
    from ssl_ae import figures

    axis = "error" if report.figure == "accuracy" else report.figure
    means = report.means(axis)
    methods, controls = ({name: means[name] for name in some} for some in (report.methods, report.controls))
    figures.label_curve(path, methods, controls, axis, title, detail)
