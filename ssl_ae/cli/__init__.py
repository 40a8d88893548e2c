"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

import typer

from ssl_ae.cli import data, decoding, doctor, label_curve, plugins, recipes, search, stages, suggest, tracking
from ssl_ae.errors import SslAeError, Stopped
from ssl_ae.stopping import Asked, leave_when_asked

app = typer.Typer(
    name="ssl-ae",
    help="""A good classifier and a reusable representation from a lot of unlabelled data and a few labels.

    \b
    ssl-ae data pack photos/ data/photos
    ssl-ae pretrain pipelines/photos.yaml
    ssl-ae extract runs/photos
    ssl-ae finetune pipelines/photos.yaml --labels 100
    ssl-ae evaluate runs/photos --split test
    """,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ssl_ae import __version__

        typer.echo(f"ssl-ae {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True)) -> None:
    return


app.add_typer(data.app, name="data")
stages.register(app)
decoding.register(app)
search.register(app)
suggest.register(app)
label_curve.register(app)
app.add_typer(plugins.app, name="plugins")
app.add_typer(recipes.app, name="recipe")
tracking.register(app)
doctor.register(app)


def main() -> None:
    """Exit codes: 0 done; 2 the input is wrong (one message, no traceback); 75 stopped on request; 1 anything else."""
    try:
        with leave_when_asked():
            app()
    except Asked:
        print("stopped; what is complete is kept. Run the same command to go on.", file=sys.stderr)
        sys.exit(Stopped.exit_code)
    except SslAeError as error:
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" on rank {rank}"
        if isinstance(error, Stopped):  # the user's wish, so no error
            print(f"rank {rank}: {error}" if place else error, file=sys.stderr)
        else:
            print(f"error{place}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
