"""run: every stage of a recipe in order, skipping what is done."""

from __future__ import annotations

from pathlib import Path

from ssl_ae import distributed
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Recipe, Stage, with_fields
from ssl_ae.registry import Registry
from ssl_ae.stages.evaluate import evaluate
from ssl_ae.stages.extract import extract
from ssl_ae.stages.finetune import check_mode, finetune
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.pretrain import pretrain
from ssl_ae.stages.workspace import open_data, open_workspace

STAGES = {"pretrain": pretrain, "extract": extract, "finetune": finetune, "evaluate": evaluate}
RESTARTABLE = {"pretrain", "finetune"}


def check_all(plan: list[Stage], recipes: list[Recipe], source: str, reporter: Reporter, registry: Registry) -> None:
    """Raise now what a later stage would refuse after an earlier one has trained for hours."""
    for stage, chosen in zip(plan, recipes, strict=True):
        _, resolved = open_data(chosen, registry, source, reporter)
        if stage.stage == "finetune":
            check_mode(resolved)


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
    registry, outcomes = Registry.discover(), []
    plan = [stage if isinstance(stage, Stage) else Stage(stage=stage) for stage in recipe.stages]
    recipes = [with_fields(recipe, stage.set, f"{source}: stages") for stage in plan]
    with distributed.process_group(recipe.device):
        check_all(plan, recipes, source, reporter, registry)
        for stage, chosen in zip(plan, recipes, strict=True):
            with open_workspace(chosen, run, source, reporter, registry, published) as ws:
                options = {"restart": restart, "force": force} if stage.stage in RESTARTABLE else {}
                outcomes.append(STAGES[stage.stage](ws, **options))
    last = outcomes[-1]
    outputs = {}
    for outcome in outcomes[:-1]:
        stage = "-".join(filter(None, [outcome.command, outcome.more.get("method")]))
        outputs |= {f"{stage}-{name}": path for name, path in outcome.outputs.items() if path != run}
    outputs |= {"run": run, **last.outputs}
    made = [outcome for outcome in outcomes if outcome.command != "evaluate"]  # which is quick, and never skipped
    done = bool(made) and all(outcome.status == "skipped" for outcome in made)
    reporter.table("files", ["", "place"], [[name, str(path)] for name, path in outputs.items()])
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
