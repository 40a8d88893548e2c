"""Options and output that commands share."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ssl_ae.progress import Reporter
    from ssl_ae.recipe import Recipe
    from ssl_ae.stages.outcome import Outcome

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/mnist-vae.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe, such as model.latent_dim=16. Repeatable."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/NAME under the current folder.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the train split.")]
EpochsOfAll = Annotated[
    int | None, typer.Option("--epochs", metavar="N", help="Passes over the train split, of every training stage.")
]
Labels = Annotated[
    str | None, typer.Option("--labels", metavar="FILE|N|all", help="CSV or Parquet of key,label; N labels in all; or all.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what was made before and start over.")]
Nproc = Annotated[int | None, typer.Option("--nproc", metavar="N", min=1, help="Start N ranks on this machine, one a GPU.")]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", metavar="N", min=0, help="With --nproc: how often ranks that die are started again.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Go on although a version or a field changed that the weights do not depend on; says which."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """Import without Python's garbage collector, and let it pass over what was imported from then on.

    Modules stay, but every few hundred new objects it walks those that are there already: a sixth of what torch takes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load(path: Path, sets: list[str] | None, fields: dict[str, Any] | None = None) -> Recipe:
    """The recipe with the fields that flags name, and then `--set`: so `--labels 100 --set data.labels.seed=1` is both."""
    from ssl_ae import recipe

    given = [f"{key}={json.dumps(value)}" for key, value in (fields or {}).items() if value is not None]
    return recipe.load(path, [*given, *(sets or [])])


def load_for_stages(path: Path, sets: list[str] | None, epochs: int | None, fields: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a command that makes all its stages, each of which heeds the flags, whatever it sets itself."""
    from ssl_ae.recipe import in_every_stage

    of_all = passes(epochs, "pretrain", "finetune")
    named = [name for name, value in (fields or {}).items() if value is not None]
    return in_every_stage(load(path, sets, (fields or {}) | of_all), of_all, named)


def tell_own_fields(recipe: Recipe, sets: list[str] | None, told: Reporter) -> None:
    """Say which stages set a field themselves that `--set` names: there it has no effect."""
    from ssl_ae.stages.pipeline import own_fields

    for text in sets or []:
        key = text.partition("=")[0].strip()
        for stage, own in own_fields(recipe, key):
            told.say(f"--set {key}: has no effect on stage {stage}, which sets {own} itself")


def passes(epochs: int | None, *sections: str) -> dict[str, Any]:
    """`--epochs` as fields of these sections: so many passes, also where the recipe wants more of small data."""
    fields = {"epochs": epochs, "min_steps": 0}
    return {} if epochs is None else {f"{section}.{name}": value for section in sections for name, value in fields.items()}


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / recipe.name


def reporter() -> Reporter:
    from ssl_ae.progress import Reporter

    return Reporter(silent=os.environ.get("RANK", "0") != "0")


def finish(outcome: Outcome, as_json: bool) -> None:
    """The answer on stdout, from one rank: the JSON object, or the folder or file of all that was made."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(outcome.as_json())
        return
    metrics = "  ".join(f"{name} {_number(value)}" for name, value in outcome.metrics.items() if "/" not in name)
    made = [path for name, path in outcome.outputs.items() if name != "run" or outcome.command == "run"]
    where = os.path.commonpath(made) if made else str(outcome.run or "")
    sys.stdout.write("  ".join(filter(None, [f"{outcome.command}: {outcome.status}", where, metrics])) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"


def print_json(value: Any) -> None:
    from ssl_ae.files import without_nan

    sys.stdout.write(json.dumps(without_nan(value), ensure_ascii=False) + "\n")
