"""pretrain, extract, finetune, evaluate, predict and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssl_ae.cli.options import (
    Epochs,
    EpochsOfAll,
    Force,
    Json,
    Labels,
    MaxRestarts,
    Nproc,
    Out,
    RecipePath,
    Restart,
    RunPath,
    Set,
    finish,
    load,
    load_for_stages,
    many_imports,
    passes,
    reporter,
    run_folder,
    tell_own_fields,
)
from ssl_ae.errors import RecipeError

if TYPE_CHECKING:
    from ssl_ae.recipe import Recipe


def register(app: typer.Typer) -> None:
    for command in (pretrain, extract, finetune, evaluate, predict, run):
        app.command()(command)


def pretrain(
    recipe: RecipePath,
    set_: Set = None,
    out: Out = None,
    epochs: Epochs = None,
    restart: Restart = False,
    force: Force = False,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> None:
    """Train the autoencoder on every row; labels are unused.

    \b
    ssl-ae pretrain pipelines/mnist_vae.yaml
    ssl-ae pretrain pipelines/mnist_vae.yaml --set model.latent_dim=16 --out runs/k16
    ssl-ae pretrain pipelines/mnist_vae.yaml --nproc 8
    torchrun --nproc-per-node 8 -m ssl_ae pretrain pipelines/mnist_vae.yaml

    Run the same command again to go on where it was stopped.
    """
    chosen = load(recipe, set_, passes(epochs, "pretrain"))
    if nproc is not None:
        start_ranks(nproc, max_restarts, chosen, str(recipe))
        return
    with many_imports():
        from ssl_ae.stages.pretrain import pretrain as stage
        from ssl_ae.stages.workspace import open_workspace

    with open_workspace(chosen, run_folder(chosen, out), str(recipe), reporter()) as ws:
        outcome = stage(ws, restart, force)
    finish(outcome, json)


def extract(
    run: RunPath,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, val, test or all.")] = "all",
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Another data set, into latents/ITS_NAME/SPLIT.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Run the decoder too: reconstruction_nats of each row.")] = False,
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="This layer in place of the code, such as h1, into layers/LAYER/SPLIT.")
    ] = None,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> None:
    """Write the code of every sample to Parquet, one row a sample.

    \b
    ssl-ae extract runs/mnist-vae
    ssl-ae extract runs/mnist-vae --split test --scores
    ssl-ae extract runs/mnist-vae --layer h1
    """
    if scores and layer is not None:
        raise RecipeError(f"--scores and --layer {layer}: scores are of the code. Run `ssl-ae extract {run} --scores` by itself.")
    with many_imports():
        from ssl_ae.stages.extract import extract as stage
        from ssl_ae.stages.stored import recipe_of
        from ssl_ae.stages.workspace import open_workspace

    told = reporter()
    chosen, source = recipe_of(run, told), str(run / "recipe.yaml")
    if nproc is not None:
        start_ranks(nproc, max_restarts, chosen, source)
        return
    with open_workspace(chosen, run, source, told) as ws:
        outcome = stage(ws, None if split == "all" else [split], data, scores, layer)
    finish(outcome, json)


def finetune(
    recipe: RecipePath,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Run folder with the pretrained model, or its finetune/METHOD.")
    ] = None,
    sequential: Annotated[bool, typer.Option("--sequential", help="Head on the stored latents; the encoder stays.")] = False,
    joint: Annotated[bool, typer.Option("--joint", help="l_Y + alpha * l_X on labelled and unlabelled rows.")] = False,
    alternate: Annotated[bool, typer.Option("--alternate", help="One step on l_X, one step on l_Y, in turn.")] = False,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Encoder and head by l_Y alone.")] = False,
    alpha: Annotated[float | None, typer.Option(metavar="A", help="Weight of l_X beside l_Y (--joint).")] = None,
    labels: Labels = None,
    set_: Set = None,
    out: Out = None,
    epochs: Epochs = None,
    restart: Restart = False,
    force: Force = False,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> None:
    """Train the head on few labels, and say whether the unlabelled data helped.

    \b
    ssl-ae finetune pipelines/mnist_vae.yaml
    ssl-ae finetune pipelines/mnist_vae.yaml --labels 100 --set data.labels.seed=1
    ssl-ae finetune pipelines/mnist_vae.yaml --joint --alpha 0.01
    ssl-ae finetune pipelines/mnist_vae.yaml --from runs/mnist-vae --out runs/try --end-to-end
    """
    modes = {"sequential": sequential, "joint": joint, "alternate": alternate, "end-to-end": end_to_end}
    chosen_modes = [mode for mode, wanted in modes.items() if wanted]
    if len(chosen_modes) > 1:
        raise RecipeError(f"--{' and --'.join(chosen_modes)}: choose one mode at a time.")
    mode = chosen_modes[0] if chosen_modes else None
    fields = {"finetune.mode": mode, "finetune.alpha": alpha, "data.labels": budget(labels)} | passes(epochs, "finetune")
    chosen = load(recipe, set_, fields)
    if alpha is not None and chosen.finetune.mode != "joint":
        raise RecipeError(f"--alpha {alpha:g} has no effect in mode {chosen.finetune.mode}; it is the weight of l_X in --joint.")
    if nproc is not None:
        start_ranks(nproc, max_restarts, chosen, str(recipe))
        return
    with many_imports():
        from ssl_ae.runs import holder_of
        from ssl_ae.stages.finetune import finetune as stage
        from ssl_ae.stages.workspace import open_workspace

    folder = out or (holder_of(from_) if from_ else run_folder(chosen, None))
    with open_workspace(chosen, folder, str(recipe), reporter()) as ws:
        outcome = stage(ws, restart, from_, force)
    finish(outcome, json)


def evaluate(
    run: RunPath,
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="train, val or test; default: test, or val where there is no test split.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Whose figures come first; default: the last finished.")
    ] = None,
    json: Json = False,
) -> None:
    """Score every finished method of a run beside its baselines.

    \b
    ssl-ae evaluate runs/mnist-vae --split val
    ssl-ae evaluate runs/mnist-vae --split test --method joint-alpha0.01
    """
    with many_imports():
        from ssl_ae.stages.evaluate import evaluate as stage
        from ssl_ae.stages.stored import recipe_of
        from ssl_ae.stages.workspace import open_workspace

    told = reporter()
    with open_workspace(recipe_of(run, told), run, str(run / "recipe.yaml"), told) as ws:
        outcome = stage(ws, split, method)
    finish(outcome, json)


def predict(
    run: RunPath,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A packed data set, WebDataset shards, or anything `data pack` reads.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.parquet", help="Where the predictions go.")],
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Which finetuned model; default: the last finished.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="train, val or test alone; default: all.")] = None,
    key: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that holds the key (tables).")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels to leave out (tables).")] = None,
    json: Json = False,
) -> None:
    """Predict labels, probabilities and reconstruction scores of new data.

    \b
    ssl-ae predict runs/mnist-vae new_photos/ --out predictions.parquet
    ssl-ae predict runs/trees new_trees.csv --key id --out predictions.parquet
    ssl-ae predict runs/mnist-vae data/mnist --split train --out guesses.parquet
    """
    with many_imports():
        from ssl_ae.data.sources import PackOptions
        from ssl_ae.stages.predict import predict as stage

    finish(stage(run, data, out, method, reporter(), PackOptions(label=label, key=key), split), json)


def run(
    recipe: RecipePath,
    labels: Labels = None,
    set_: Set = None,
    out: Out = None,
    epochs: EpochsOfAll = None,
    restart: Restart = False,
    force: Force = False,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> None:
    """Every stage of the recipe in order, skipping what is done.

    \b
    ssl-ae run pipelines/digits_demo.yaml
    ssl-ae run pipelines/mnist_vae.yaml --out runs/again
    ssl-ae run pipelines/mnist_100.yaml --labels sheet.csv
    """
    chosen = load_for_stages(recipe, set_, epochs, {"data.labels": budget(labels)})
    if nproc is not None:
        start_ranks(nproc, max_restarts, chosen, str(recipe))
        return
    with many_imports():
        from ssl_ae.stages.pipeline import run_stages

    told = reporter()
    tell_own_fields(chosen, set_, told)
    outcome = run_stages(chosen, run_folder(chosen, out), str(recipe), told, restart, force)
    told.table("files", ["", "place"], [[name, str(path)] for name, path in outcome.outputs.items()])
    finish(outcome, json)


def start_ranks(ranks: int, restarts: int, recipe: Recipe, source: str) -> None:
    """This command on several ranks. A mistake in the recipe or the data is told once, not by every rank."""
    from ssl_ae.distributed.launching import launch
    from ssl_ae.registry import Registry
    from ssl_ae.stages.workspace import open_data

    open_data(recipe, Registry.discover(), source, reporter())
    launch(ranks, restarts)


def budget(labels: str | None) -> object:
    """`--labels` as the recipe's field: a total, `all`, or a file."""
    if labels is None:
        return None
    return {"total": int(labels)} if re.fullmatch(r"-?\d+", labels) else labels
