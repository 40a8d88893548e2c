"""doctor."""

from __future__ import annotations

import textwrap

import typer

from ssl_ae.cli.options import Json, many_imports, print_json

MARKS = {"ok": ("ok", "green"), "warning": ("careful", "yellow"), "broken": ("BROKEN", "red"), "skipped": ("skipped", "yellow")}
WIDTH = 110  # characters of a line
MARK = 8  # of the first column


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(json: Json = False) -> None:
    """Look at versions, devices, plugins, store and disk, and train for a few seconds. Exit code 1 where something is broken.

    \b
    ssl-ae doctor
    ssl-ae doctor --json
    """
    from ssl_ae.doctor import broken_ones, examine, report_of

    findings = {}
    with many_imports():
        for name, finding in examine():
            findings[name] = finding
            if not json:
                typer.echo(_told(name, *MARKS[finding.status], finding.text, finding.cures))
    broken = broken_ones(findings)
    if json:
        trial = findings["self-test"].facts
        metrics = {f"self-test/{key}": value for key, value in trial.items() if isinstance(value, float)}
        warnings = [f"{name}: {finding.text}" for name, finding in findings.items() if finding.status != "ok"]
        common = {"command": "doctor", "run": None, "status": "done", "outputs": {}, "metrics": metrics}
        print_json({**common, "mlflow_run_id": None, "warnings": warnings, **report_of(findings)})
    elif broken:
        typer.echo(f"\nbroken: {', '.join(broken)}")
    else:
        typer.echo("\nssl-ae works here.")
    if broken:
        raise typer.Exit(1)


def _told(name: str, mark: str, colour: str, text: str, cures: list[str]) -> str:
    """`ok      disk       ...`, and a line for each cure below it."""
    margin = " " * (MARK + 11)
    lines = textwrap.wrap(text, WIDTH - len(margin), break_long_words=False, break_on_hyphens=False) or [""]
    for cure in cures:
        lines += textwrap.wrap(f"-> {cure}", WIDTH - len(margin), subsequent_indent="   ", break_long_words=False)
    head = typer.style(mark.ljust(MARK), fg=colour, bold=mark == "BROKEN") + name.ljust(11)
    return head + f"\n{margin}".join(lines)
