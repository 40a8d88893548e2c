"""Reading back what a run was made with: its recipe, against the plugins of today, and its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_ae import checkpoint, files, runs
from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card
from ssl_ae.data.dataset import DataSet
from ssl_ae.distributed import choose_device
from ssl_ae.errors import CheckpointError, PluginError, RecipeError
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Recipe
from ssl_ae.registry import Registry
from ssl_ae.resolve import Part, Resolved, resolve


def card_with_labels(recipe: Recipe, data: DataSet) -> Card:
    """The card; where only the user's label file says what labels mean, with that."""
    given = label_file(recipe)
    if data.card.y is None and given is not None:
        return data.card.model_copy(update={"y": data.read_labels(given).y})
    return data.card


def kept_recipe(folder: Path) -> Recipe:
    """The recipe that a folder keeps. Labels that came in a file are those of the copy beside it (`keep_labels`): what becomes
    of the user's file afterwards is another story than the one that was trained on."""
    recipe = recipes.load(folder / runs.RECIPE)
    given = label_file(recipe)
    if given is None or not (copy := copy_of(given, folder)).exists():
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": str(copy)})})


def keep_labels(recipe: Recipe, folder: Path) -> None:
    """Copy the label file that a recipe names into a folder that keeps it. Pretraining may come before there is one."""
    given = label_file(recipe)
    if given is not None and given.exists():
        with files.whole_file(copy_of(given, folder)) as aside:
            shutil.copyfile(given, aside)


def label_file(recipe: Recipe) -> Path | None:
    """The file that the recipe takes its labels from; None where it draws them from the data or takes all of those."""
    labels = recipe.data.labels
    return Path(labels) if isinstance(labels, str) and labels != "all" else None


def copy_of(label_file: Path, folder: Path) -> Path:
    return folder / f"labels{label_file.suffix}"


def resolve_stored(recipe: Recipe, registry: Registry, card: Card, source: str) -> Resolved:
    """Resolve; a recipe that a run was made with must meet component versions that can read what it stored."""
    stored = recipe.components or {}
    try:
        resolved = resolve(recipe, registry, card, source)
    except PluginError as error:
        made_with = sorted({entry["distribution"] for entry in stored.values()})
        if not made_with:
            raise
        raise CheckpointError(f"{error}\nThis run was made with {', '.join(made_with)}: install what is missing.") from error
    return replace(
        resolved,
        encoder=_of_stored_version(resolved.encoder, stored, source),
        decoder=_of_stored_version(resolved.decoder, stored, source),
        regularizers=tuple(_of_stored_version(part, stored, source) for part in resolved.regularizers),
        head=_of_stored_version(resolved.head, stored, source),
    )


def _of_stored_version(part: Part, stored: dict[str, dict[str, Any]], source: str) -> Part:
    before = stored.get(f"{part.entry.kind} {part.full_name}")
    if before is None or before["version"] in (part.cls.version, *part.cls.upgrades_from):
        return replace(part, stored_version=before and before["version"])
    raise CheckpointError(
        f"{source}: {part.entry.kind} {part.full_name} was stored by version {before['version']} and version "
        f"{part.cls.version} is installed. Install {before['distribution']}."
    )


def read_model(resolved: Resolved, path: Path) -> dict[str, Tensor]:
    """Stored weights of this model, upgraded where a component says how. Raises CheckpointError."""
    weights = checkpoint.read_weights(path)
    parts = {"encoder.": resolved.encoder, "decoder.": resolved.decoder, "head.": resolved.head}
    parts |= {f"regularizers.{i}.": part for i, part in enumerate(resolved.regularizers)}
    for prefix, part in parts.items():
        if part.stored_version not in (None, part.cls.version):
            own = {name.removeprefix(prefix): weights.pop(name) for name in [*weights] if name.startswith(prefix)}
            weights |= {f"{prefix}{name}": value for name, value in part.cls.upgrade(part.stored_version, own).items()}
    return weights


def recipe_of(run: Path, reporter: Reporter) -> Recipe:
    """The recipe a run folder was made with. Raises CheckpointError for a folder that is no run.

    A run made on a device that this machine lacks is read on another, aloud. Pretraining learnt from no label, so its label
    file is the user's as it is now, and the copy only where that is gone.
    """
    path = run / runs.RECIPE
    if not path.exists():
        raise CheckpointError(f"{run} is no run folder: it has no {runs.RECIPE}. Run `ssl-ae pretrain RECIPE --out {run}` first.")
    recipe = recipes.load(path)
    given = label_file(recipe)
    return on_this_machine(recipe if given is None or given.exists() else kept_recipe(run), reporter)


def on_this_machine(recipe: Recipe, reporter: Reporter) -> Recipe:
    try:
        choose_device(recipe.device)
    except RecipeError:
        here = recipe.model_copy(update={"device": "auto"})
        reporter.say(f"the run was made on {recipe.device}, which this machine lacks; going on on {choose_device('auto')}")
        return here
    return recipe
