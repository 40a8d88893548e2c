"""label-curve: how good every method is with few labels, and with more."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ssl_ae.cli.options import (
    EpochsOfAll,
    Json,
    MaxRestarts,
    Nproc,
    Out,
    RecipePath,
    Restart,
    Set,
    finish,
    load_for_stages,
    many_imports,
    reporter,
    run_folder,
    tell_own_fields,
)
from ssl_ae.cli.stages import start_ranks
from ssl_ae.errors import RecipeError, did_you_mean, listing


def register(app: typer.Typer) -> None:
    app.command("label-curve")(label_curve)


def label_curve(
    recipe: RecipePath,
    labels: Annotated[str, typer.Option("--labels", metavar="N,N,...", help="Numbers of labels, in all classes together.")],
    seeds: Annotated[str, typer.Option("--seeds", metavar="N|A-B", help="Draws of the labels: 0 to N-1, or A to B.")] = "10",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,...",
            help="sequential, joint, alternate, end-to-end; joint-alpha0.1, sequential-logistic for another alpha or head; "
            "default: what the recipe finetunes.",
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Controls beside the methods; they may be added later.")
    ] = True,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="val or test: what methods are judged on.")] = "val",
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="Processes; default: one a core, or one a GPU.")
    ] = None,
    set_: Set = None,
    out: Out = None,
    epochs: EpochsOfAll = None,
    restart: Restart = False,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> None:
    """Compare methods and controls over numbers of labels and draws of them, from one pretraining.

    \b
    ssl-ae label-curve pipelines/digits_demo.yaml --labels 10,30,100,300 --seeds 10
    ssl-ae label-curve pipelines/mnist_vae.yaml --labels 100,1000 --methods sequential,end-to-end --seeds 5 --jobs 8

    Controls: a network of the labels alone, with and without the recipe's perturbations; PCA + logistic regression; heads
    that learn from unlabelled rows, on PCA without a network. Draws are class-balanced and nested, the same for all.
    """
    wanted = {
        "labels": numbers("--labels", labels, at_least=1),
        "seeds": draws(seeds),
        "methods": tuple(filter(None, map(str.strip, methods.split(",")))) if methods is not None else None,
        "controls": controls,
        "split": split,
        "jobs": jobs,
        "restart": restart,
    }
    if split not in ("val", "test"):
        raise RecipeError(f"--split {split}: expected {listing(('val', 'test'))}.{did_you_mean(split, ('val', 'test'))}")
    if wanted["methods"] == ():
        raise RecipeError(f"--methods {methods!r}: expected names of modes, such as sequential,joint.")
    chosen = load_for_stages(recipe, set_, epochs)
    if nproc is not None:
        start_ranks(nproc, max_restarts, chosen, str(recipe))
        return
    with many_imports():
        from ssl_ae.stages.label_curve import Wanted
        from ssl_ae.stages.label_curve import label_curve as stage

    told = reporter()
    tell_own_fields(chosen, set_, told)
    finish(stage(chosen, run_folder(chosen, out), str(recipe), told, Wanted(**wanted)), json)


def numbers(option: str, text: str, at_least: int) -> tuple[int, ...]:
    """Whole numbers, each once, in order. Raises RecipeError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not re.fullmatch(r"\d{1,12}", word) or int(word) < at_least]
    if wrong or not words:
        shown = repr(wrong[0]) if wrong else repr(text)
        raise RecipeError(
            f"{option} {text}: {shown} is no whole number of at least {at_least}; give some, as in {option} 10,30,100."
        )
    return tuple(sorted({int(word) for word in words}))


def draws(text: str) -> tuple[int, ...]:
    """`10`: 0 to 9; `20-29`: those. Raises RecipeError."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    first, last = (int(found[1]), int(found[2])) if found and found[2] else (0, int(found[1]) - 1 if found else -1)
    if last < first:
        raise RecipeError(f"--seeds {text}: expected how many draws, at least 1, or a range such as 20-29.")
    return tuple(range(first, last + 1))
