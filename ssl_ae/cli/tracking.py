"""ui and track sync."""

from __future__ import annotations

from typing import Annotated

import typer

from ssl_ae.cli.options import Json, RunPath, print_json

track = typer.Typer(help="What runs report to MLflow.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.add_typer(track, name="track")
    app.command()(ui)


@track.command()
def sync(
    run: RunPath,
    uri: Annotated[
        str | None, typer.Option("--uri", metavar="URI", help="Tracking server or store. Default: MLFLOW_TRACKING_URI.")
    ] = None,
    json: Json = False,
) -> None:
    """Deliver what a run still has in its journal, also to another server.

    \b
    ssl-ae track sync runs/mnist-vae
    ssl-ae track sync runs/mnist-vae --uri http://tracking:5000
    """
    from ssl_ae.tracking.sync import sync as deliver

    found = deliver(run, uri)
    if json:
        print_json(
            {
                "command": "track sync",
                "run": str(run),
                "status": "done",
                "outputs": {},
                "metrics": {},
                "mlflow_run_id": None,
                "warnings": [],
                "delivered": found,
            }
        )
    else:
        for name, value in found.items():
            typer.echo(f"{name}: {value}")


def ui(
    port: Annotated[int, typer.Option(metavar="PORT", help="Port on this machine.")] = 5000,
    uri: Annotated[str | None, typer.Option("--uri", metavar="URI", help="Another store. Default: runs/mlflow.db here.")] = None,
) -> None:
    """Open MLflow's own UI on the local store.

    \b
    ssl-ae ui --port 5001
    """
    from ssl_ae.tracking.ui import ui as serve

    raise typer.Exit(serve(uri, port))
