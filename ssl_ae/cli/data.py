"""data pack, data inspect and data list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssl_ae.cli.options import Json, finish, print_json, reporter
from ssl_ae.errors import DataError, RecipeError, did_you_mean, listing

app = typer.Typer(
    help="Data sets: pack any source into shards, look into them, list them.", no_args_is_help=True, rich_markup_mode=None
)

TASKS = ("classes", "regression", "multilabel")


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, file, or the name of a data set (digits, photos, diabetes, breast_cancer, wine, iris, mnist).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for card and shards.")],
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column that holds the label (tables); a,b,c for several targets.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that holds the key (tables).")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize images to this height and width, such as 64x64.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="classes, regression or multilabel; default: as the labels look.")
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option(metavar="SEED", min=0, help="Of a run's latents: train rows are one draw of their code, not its mean."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set in OUT.")] = False,
    json: Json = False,
) -> None:
    """Turn a source into WebDataset shards and a card.

    \b
    ssl-ae data pack photos/ data/photos --size 64x64     class sub-folders, or flat = unlabelled
    ssl-ae data pack downloads/mnist data/mnist           IDX files
    ssl-ae data pack table.csv data/table --label species CSV or Parquet
    ssl-ae data pack digits data/digits                   named data set
    ssl-ae data pack runs/mnist-m1/latents data/codes     codes of a run

    \b
    Also .npz files and WebDataset shards made elsewhere. The same source gives the same bytes.
    """
    from ssl_ae.data.card import Card
    from ssl_ae.data.pack import pack as pack_source
    from ssl_ae.data.sources import PackOptions
    from ssl_ae.registry import Registry
    from ssl_ae.stages.outcome import Outcome

    if task is not None and task not in TASKS:
        raise RecipeError(f"--task {task}: expected {listing(TASKS)}.{did_you_mean(task, TASKS)}")
    told = reporter()
    before = Card.load(out).fingerprint if (out / "card.json").exists() else None
    options = PackOptions(label=label, key=key, size=_size(size), task=task, draw=draw)
    count = 0

    def progress(samples: int) -> None:
        nonlocal count
        count += samples
        if count // 100_000 != (count - samples) // 100_000:
            told.say(f"packed {count:,} samples")

    card = pack_source(source, out, options, Registry.discover().sources(), progress, overwrite)
    rows = {name: split.rows for name, split in card.splits.items()}
    labels = _labels(card.y) if card.y else "no labels"
    told.say(
        f"{card.name}: {card.x.kind} {card.x.shape} {card.x.dtype}, {labels}, " + ", ".join(f"{n} {r:,}" for n, r in rows.items())
    )
    status = "skipped" if before == card.fingerprint else "done"
    metrics = {f"{name}/rows": float(count) for name, count in rows.items()}
    finish(Outcome("data pack", None, status, {"data": out, "card": out / "card.json"}, metrics), json)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A data set: a folder, or its URL (file:, http:, https:, s3:).")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PNG", help="Where the picture goes. Default: DIR/_samples.png, of a URL ./_samples.png."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the card, the counts per class, whether every checksum holds, and draw a grid of samples.

    \b
    ssl-ae data inspect data/mnist
    """
    import numpy as np

    from ssl_ae import figures
    from ssl_ae.data.dataset import DataSet
    from ssl_ae.data.pack import inspect as report_of

    data = DataSet.open(folder, verify="none")  # the report names every shard that is damaged
    report = report_of(data)
    picture = None
    if not report["damaged"]:
        split = data.split("train")
        rows = np.unique(np.linspace(0, split.rows - 1, min(40, split.rows)).astype(int))
        labels = data.labels("train")[rows]
        picture = figures.sample_grid(
            out or (data.path if isinstance(data.path, Path) else Path()) / "_samples.png",
            split.read(rows),
            _titles(labels, data.card.y),
            data.card.x.kind,
        )
    told = reporter()
    if json:
        print_json(
            {
                "command": "data inspect",
                "run": None,
                "status": "done",
                "outputs": {"picture": str(picture) if picture else None},
                "metrics": {},
                "mlflow_run_id": None,
                "warnings": told.warnings,
                "report": report,
            }
        )
    else:
        _show(told, report)
        if picture:
            typer.echo(f"picture: {picture}")
    if report["damaged"]:
        raise DataError(f"{folder} is damaged: {', '.join(report['damaged'])}. Pack the source again.")


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of data sets.")] = Path("data"),
    json: Json = False,
) -> None:
    """List the data sets under a folder.

    \b
    ssl-ae data list
    """
    from ssl_ae.data.card import Card

    cards = {path.parent: Card.load(path.parent) for path in sorted(folder.glob("*/card.json"))}
    if json:
        sets = [
            {"name": card.name, "path": str(path), "rows": {n: s.rows for n, s in card.splits.items()}}
            for path, card in cards.items()
        ]
        print_json(
            {
                "command": "data list",
                "run": None,
                "status": "done",
                "outputs": {},
                "metrics": {},
                "mlflow_run_id": None,
                "warnings": [],
                "data": sets,
            }
        )
        return
    for path, card in cards.items():
        rows = ", ".join(f"{name} {split.rows:,}" for name, split in card.splits.items())
        typer.echo(f"{path}  {card.x.kind} {card.x.shape}  {rows}")
    if not cards:
        typer.echo(f"no data set under {folder}. Make one with `ssl-ae data pack SOURCE {folder}/NAME`.", err=True)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise RecipeError(f"--size {text}: expected HEIGHTxWIDTH, such as 64x64.")
    return int(height), int(width)


def _labels(y) -> str:
    """`10 classes`, `1 regression target`."""
    noun = {"classes": "class", "regression": "regression target", "multilabel": "yes-or-no target"}[y.task]
    plural = "" if len(y.names) == 1 else "es" if y.task == "classes" else "s"
    return f"{len(y.names)} {noun}{plural}"


def _titles(labels, y) -> list[str]:
    if y is None:
        return [""] * len(labels)
    if y.task == "classes":
        return [y.names[label] if label >= 0 else "" for label in labels]
    return [", ".join(f"{value:.3g}" for value in row) for row in labels]


def _show(told, report: dict) -> None:
    x, y = report["x"], report["y"]
    told.say(
        f"{report['name']}: {x['kind']} {tuple(x['shape'])} {x['dtype']} in [{x['range'][0]:g}, {x['range'][1]:g}], "
        f"from {report['source']}"
    )
    told.say(f"fingerprint {report['fingerprint'][:16]}" + (f", licence {report['licence']}" if report["licence"] else ""))
    splits = report["splits"]
    names = y["names"] if y and y["task"] == "classes" else []
    rows = []
    for name, split in splits.items():
        counts = [split["labeled"], *((split["classes"] or {}).get(label) for label in names)]
        rows.append([name, f"{split['rows']:,}", *("?" if count is None else f"{count:,}" for count in counts)])
    told.table("rows", ["split", "rows", "labelled", *names], rows)
    told.table(
        "shards",
        ["file", "rows", "bytes", "checksum"],
        [
            [s["file"], f"{s['rows']:,}", f"{s['bytes']:,}", "DAMAGED" if s["file"] in report["damaged"] else s["verdict"]]
            for s in report["shards"]
        ],
    )
    for shard in report["shards"]:
        if shard["file"] in report["damaged"]:
            told.say(shard["verdict"])
