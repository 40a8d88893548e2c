"""run: every stage of a recipe in order, skipping what is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from ssl_ae import distributed, tables
from ssl_ae.errors import DataError, RecipeError, listing
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Recipe, Rounds, Stage, StageName, meet, with_fields
from ssl_ae.registry import Registry
from ssl_ae.runs import StageFolder
from ssl_ae.stages.evaluate import evaluate
from ssl_ae.stages.extract import extract
from ssl_ae.stages.finetune import check_mode, finetune
from ssl_ae.stages.labels import check_guesses
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.predict import MADE_BY, predict
from ssl_ae.stages.pretrain import pretrain
from ssl_ae.stages.workspace import Workspace, open_data, open_workspace

RESTARTABLE = {"pretrain", "finetune"}
PREDICTIONS = "train.parquet"  # of a method, in its own folder `predictions`


@dataclass
class Chain:
    """What a stage goes on from: whose encoder, whose head, and which guesses of the train rows."""

    encoder: Path  # a run folder, or that of a finetuning that trained the encoder too
    method: Path | None = None  # the last finetuning
    guesses: Path | None = None  # its predictions

    def make(self, name: StageName, ws: Workspace, options: dict[str, bool]) -> Outcome:
        """One stage, which the next goes on from."""
        return getattr(self, f"_{name}")(ws, **options)

    def _pretrain(self, ws: Workspace, **options: bool) -> Outcome:
        self.encoder = ws.run
        return pretrain(ws, **options)

    def _extract(self, ws: Workspace) -> Outcome:
        return extract(replace(ws, run=self.encoder))

    def _finetune(self, ws: Workspace, **options: bool) -> Outcome:
        outcome = finetune(ws, pretrained=self.encoder, **options)
        self.method = outcome.outputs["stage"]
        if ws.recipe.finetune.mode != "sequential":
            self.encoder = self.method
        return outcome

    def _predict(self, ws: Workspace) -> Outcome:
        self.guesses = self.method / "predictions" / PREDICTIONS
        outcome = Outcome("predict", ws.run, "skipped", outputs={"predictions": self.guesses}, more={"method": self.method.name})
        with distributed.main_first() as main:
            if main and not is_of(self.guesses, self.method):
                outcome = predict(ws.run, str(ws.data.path), self.guesses, self.method.name, ws.reporter, split="train")
        return outcome

    def _evaluate(self, ws: Workspace) -> Outcome:
        return evaluate(ws)


def is_of(predictions: Path, method: Path) -> bool:
    """Whether a table holds the predictions of a method as it is now."""
    try:
        made_by = tables.read_metadata(predictions).get(MADE_BY)
    except DataError:
        return False
    return made_by == StageFolder(method).fingerprint


def planned(recipe: Recipe) -> list[Stage]:
    """The stages in their order, those of rounds as often as they are repeated. Raises RecipeError where there are none."""
    if not recipe.stages:
        raise RecipeError(f"stages = []: expected at least one of {listing(get_args(StageName), 'and')}.")
    plan = []
    for entry in recipe.stages:
        rounds = isinstance(entry, Rounds)
        for stage in entry.stages * entry.repeat if rounds else (entry,):
            plan.append(stage if isinstance(stage, Stage) else Stage(stage=stage))
    return plan


def own_fields(recipe: Recipe, key: str) -> list[tuple[StageName, str]]:
    """(stage, field) where a stage sets a field itself, a part of it or what it is a part of; each once."""
    return list(dict.fromkeys((stage.stage, own) for stage in planned(recipe) for own in stage.set if meet(own, key)))


def check_all(plan: list[Stage], recipes: list[Recipe], source: str, reporter: Reporter, registry: Registry) -> None:
    """Raise now what a later stage would refuse after an earlier one has trained for hours."""
    made: set[str] = set()
    for stage, chosen in zip(plan, recipes, strict=True):
        _, resolved = open_data(chosen, registry, source, reporter)
        if stage.stage == "finetune":
            check_mode(resolved)
            check_guesses(resolved, "predict" in made)
        if stage.stage == "predict" and "finetune" not in made:
            raise RecipeError(f"{source}: stages: predict needs a finetune before it.")
        made.add(stage.stage)


def run_stages(
    recipe: Recipe,
    run: Path,
    source: str,
    reporter: Reporter,
    restart: bool = False,
    force: bool = False,
    published: bool = True,
) -> Outcome:
    """The outcome of the last stage, with every stage's outputs. `published` is the workspaces'."""
    registry, outcomes, chain = Registry.discover(), [], Chain(run)
    plan = planned(recipe)
    recipes = [with_fields(recipe, stage.set, f"{source}: stages") for stage in plan]
    with distributed.process_group(recipe.device):
        check_all(plan, recipes, source, reporter, registry)
        for stage, chosen in zip(plan, recipes, strict=True):
            if chain.guesses and chosen.data.guesses is None:
                chosen = with_fields(chosen, {"data.guesses": str(chain.guesses)}, source)
            with open_workspace(chosen, run, source, reporter, registry, published) as ws:
                options = {"restart": restart, "force": force} if stage.stage in RESTARTABLE else {}
                outcomes.append(chain.make(stage.stage, ws, options))
    last = outcomes[-1]
    outputs = {}
    for outcome in outcomes[:-1]:
        stage = "-".join(filter(None, [outcome.command, outcome.more.get("method")]))
        outputs |= {f"{stage}-{name}": path for name, path in outcome.outputs.items() if path != run}
    outputs |= {"run": run, **last.outputs}
    made = [outcome for outcome in outcomes if outcome.command != "evaluate"]  # which is quick, and never skipped
    done = bool(made) and all(outcome.status == "skipped" for outcome in made)
    return Outcome(
        "run",
        run,
        "skipped" if done else "done",
        outputs=outputs,
        metrics=last.metrics,
        mlflow_run_id=last.mlflow_run_id,
        warnings=list(reporter.warnings),
        more=last.more,
    )
