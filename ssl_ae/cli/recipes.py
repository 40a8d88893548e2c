"""recipe show and recipe schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssl_ae.cli.options import Json, RecipePath, Set, load, many_imports, print_json

app = typer.Typer(
    help="Recipes: see every default, and the JSON schema for editors.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def show(recipe: RecipePath, set_: Set = None, json: Json = False) -> None:
    """Print the recipe with every default; full names and versions too where its data is at hand.

    \b
    ssl-ae recipe show pipelines/mnist_vae.yaml
    """
    from ssl_ae import recipe as recipes

    chosen = load(recipe, set_)
    tree, note = chosen.model_dump(mode="json"), None
    if ":" in chosen.data.path or Path(chosen.data.path).is_dir():  # a URL is opened where it lies
        with many_imports():
            from ssl_ae.data.dataset import DataSet
            from ssl_ae.registry import Registry
            from ssl_ae.stages.stored import card_with_labels, resolve_stored

        card = card_with_labels(chosen, DataSet.open(chosen.data.path, verify="none"))
        tree = resolve_stored(chosen, Registry.discover(), card, str(recipe)).as_dict()
    else:
        note = f"{chosen.data.path} is not there yet, so the components' own options are shown as given."
    if json:
        print_json(
            {
                "command": "recipe show",
                "run": None,
                "status": "done",
                "outputs": {},
                "metrics": {},
                "mlflow_run_id": None,
                "warnings": [note] if note else [],
                "recipe": tree,
            }
        )
        return
    typer.echo(recipes.to_yaml(tree), nl=False)
    if note:
        typer.echo(f"note: {note}", err=True)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to a file instead of stdout.")] = None,
) -> None:
    """Print the JSON schema of a recipe, for editors that complete YAML.

    \b
    ssl-ae recipe schema --out recipe.schema.json
    """
    import json

    from ssl_ae import files
    from ssl_ae.recipe import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        files.write_text(out, text)
