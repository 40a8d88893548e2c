"""suggest: which samples to label next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssl_ae.cli.options import Json, RunPath, finish, many_imports, reporter


def register(app: typer.Typer) -> None:
    app.command()(suggest)


def suggest(
    run: RunPath,
    budget: Annotated[int, typer.Option("--budget", metavar="N", min=1, help="How many samples you will label.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.csv", help="The sheet to fill in.")],
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Whose doubts to follow; default: the last finished, or none.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose the samples to label next, and write a sheet for their labels.

    \b
    ssl-ae suggest runs/photos --budget 50 --out sheet.csv
    ssl-ae finetune pipelines/photos.yaml --labels sheet.csv        # once the column label is filled in
    ssl-ae suggest runs/photos --budget 50 --out more.csv           # what that is unsure of
    ssl-ae finetune pipelines/photos.yaml --labels more.csv         # it has the labels of sheet.csv, too

    Before anything is finetuned: samples that are typical of the data and unlike each other. Afterwards: those that the model
    is unsure of, so two sheets often tell it more than one of the same budget. Below them a sheet has every label that there is.
    Thumbnails of images lie beside it. Rows may stay empty.
    """
    with many_imports():
        from ssl_ae.stages.stored import recipe_of
        from ssl_ae.stages.suggest import suggest as stage
        from ssl_ae.stages.workspace import open_workspace

    told = reporter()
    with open_workspace(recipe_of(run, told), run, str(run / "recipe.yaml"), told) as ws:
        outcome = stage(ws, budget, out, method)
    finish(outcome, json)
