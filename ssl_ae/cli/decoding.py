"""reconstruct and sample: what the decoder of a run makes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ssl_ae.cli.options import Json, RunPath, finish, many_imports, reporter


def register(app: typer.Typer) -> None:
    for command in (reconstruct, sample):
        app.command()(command)


def reconstruct(
    run: RunPath,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A packed data set, WebDataset shards, or anything `data pack` reads.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results: a data set, scores, a picture.")],
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, val, test or all.")] = "all",
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="Disturb the samples first as in training, and measure how well that is undone.")
    ] = False,
    images: Annotated[bool, typer.Option("--images", help="One PNG a sample too, in DIR/images.")] = False,
    draws: Annotated[
        int | None,
        typer.Option(metavar="S", min=1, help="Bounds of log p(x) from S draws of z: elbo and iwae."),
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that holds the key (tables).")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels (tables).")] = None,
    json: Json = False,
) -> None:
    """Clean, complete or colour new samples: encode and decode each, without noise of its own.

    \b
    ssl-ae reconstruct runs/mnist-denoising scans/ --out cleaned --images
    ssl-ae reconstruct runs/mnist-denoising data/mnist --split val --corrupt --out checked
    ssl-ae reconstruct runs/mnist-vae data/mnist --split val --draws 100 --out bounds

    DIR becomes a data set with the same keys and labels, to be trained on or predicted like any other.
    """
    with many_imports():
        from ssl_ae.data.sources import PackOptions
        from ssl_ae.stages.reconstruct import Wishes
        from ssl_ae.stages.reconstruct import reconstruct as stage

    chosen, wishes = None if split == "all" else split, Wishes(corrupt, images, draws)
    finish(stage(run, data, out, chosen, wishes, reporter(), PackOptions(label=label, key=key)), json)


class Prior(StrEnum):
    normal = "normal"
    mixture = "mixture"


def sample(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="Where the picture goes.")],
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            min=1,
            help="Samples (64), values a side of --grid (20), rows of --traverse (6), or codes of a way (10).",
        ),
    ] = None,
    prior: Annotated[
        Prior | None,
        typer.Option(
            help="N(0, I), or a mixture of Gaussians fitted to the stored codes. Default: mixture for deterministic encoders."
        ),
    ] = None,
    components: Annotated[int | None, typer.Option(metavar="C", min=1, help="Gaussians of the mixture (10).")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="The whole plane of a two-dimensional code.")] = False,
    traverse: Annotated[
        int | None, typer.Option(metavar="DIM", help="One dimension, from 1, from -3 to 3 standard deviations.")
    ] = None,
    interpolate: Annotated[
        tuple[str, str] | None, typer.Option(metavar="KEY KEY", help="The straight way from one sample's code to another's.")
    ] = None,
    codes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Codes of your own: .parquet with a column latent, or .npy (N, K).")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", min=0, help="Of what is drawn (0).")] = None,
    npy: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="The decoded samples too, (N, *shape) on the scale of the data.")
    ] = None,
    json: Json = False,
) -> None:
    """Generate: decode codes drawn from a prior, chosen, or on the way between two samples, and draw what comes out.

    \b
    ssl-ae sample runs/mnist-vae --out samples.png
    ssl-ae sample runs/digits-demo --prior mixture --components 20 --out samples.png
    ssl-ae sample runs/digits-vae-2d --grid --out plane.png
    ssl-ae sample runs/mnist-vae --traverse 3 --out third.png
    ssl-ae sample runs/mnist-vae --interpolate train-00000017 train-00000019 --out way.png
    """
    with many_imports():
        from ssl_ae.stages.sample import Asked
        from ssl_ae.stages.sample import sample as stage

    asked = Asked(n, prior and prior.value, components, grid, traverse, interpolate, codes, seed)
    finish(stage(run, asked, out, npy, reporter()), json)
