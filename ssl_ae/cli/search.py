"""search: what is like a sample, by its code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_ae.cli.options import Json, RunPath, finish, many_imports, reporter
from ssl_ae.errors import RecipeError

if TYPE_CHECKING:
    from ssl_ae.stages.outcome import Outcome


def register(app: typer.Typer) -> None:
    app.command()(search)


def search(
    run: RunPath,
    query: Annotated[
        str | None,
        typer.Option("--query", metavar="KEY|FILE", help="Key of a sample of the run's data, or anything `predict` reads."),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Neighbours of each query.")] = 10,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Where to search: train, val or test.")] = "train",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="A picture of the queries and their neighbours.")
    ] = None,
    precision: Annotated[
        bool, typer.Option("--precision", help="Measure instead: how often neighbours of validation rows have their label.")
    ] = False,
    queries: Annotated[
        int | None, typer.Option("--queries", metavar="N", min=1, help="With --precision: how many rows ask; default: all.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that holds the key (tables).")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels to leave out (tables).")] = None,
    json: Json = False,
) -> None:
    """Find the samples whose codes are nearest: by Hamming distance of bits and symbols, by Euclidean distance of real codes.

    \b
    ssl-ae search runs/mnist-hashing --query test-00000007 --top 10 --out like_it.png
    ssl-ae search runs/mnist-hashing --query scan.png --split train
    ssl-ae search runs/mnist-hashing --precision

    A file asks with each of its samples. Search of bits needs faiss: pip install 'ssl-ae[faiss]'.
    """
    if (query is None) == (not precision):
        raise RecipeError(
            "search either for the like of a sample (--query KEY|FILE) or measure on validation rows (--precision)."
        )
    if queries is not None and not precision:
        raise RecipeError(f"--queries {queries}: has no effect without --precision. Leave it out.")
    if precision and (out, key, label) != (None, None, None):
        raise RecipeError("--out, --key and --label are of a --query; with --precision they have no effect. Leave them out.")
    with many_imports():
        from ssl_ae.data.sources import PackOptions
        from ssl_ae.stages import search as stage
        from ssl_ae.stages.stored import recipe_of
        from ssl_ae.stages.workspace import open_workspace

    told = reporter()
    with open_workspace(recipe_of(run, told), run, str(run / "recipe.yaml"), told) as ws:
        if precision:
            outcome = stage.precision(ws, top, split, queries)
        else:
            outcome = stage.search(ws, query, top, split, out, PackOptions(label=label, key=key))
    if not json:
        tell(outcome)
    finish(outcome, json)


def tell(outcome: Outcome) -> None:
    """The neighbours of each query, one a line."""
    for result in outcome.more["results"]:
        typer.echo(result["query"])
        width = max((len(each["key"]) for each in result["neighbours"]), default=0)
        for place, each in enumerate(result["neighbours"], start=1):
            typer.echo(f"{place:4d}  {each['key']:{width}}  {each['distance']:<8.4g}{shown(each['label'])}".rstrip())


def shown(label: Any) -> str:
    if isinstance(label, dict):
        return "  ".join(f"{name} {value:.4g}" for name, value in label.items())
    return "" if label is None else str(label)
