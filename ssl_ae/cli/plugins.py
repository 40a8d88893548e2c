"""plugins list, show, check and new."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Plugins: what is installed, what it does, and the start of your own.", no_args_is_help=True, rich_markup_mode=None
)
