"""What a label curve compares: the methods of a recipe, and controls that do without unlabelled data or without a network."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch

from ssl_ae import checkpoint, distributed, files
from ssl_ae.components import Config
from ssl_ae.errors import RecipeError, did_you_mean, listing
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Mode, ModelSection, Recipe, Stage, Training, with_fields
from ssl_ae.registry import Registry
from ssl_ae.resolve import Part, Resolved
from ssl_ae.stages.baselines import (
    AUGMENTED,
    PCA,
    UNREAD,
    Components,
    fit_components,
    fit_linear,
    networks_of,
    predict_linear,
    scaled,
    train_labels_only,
)
from ssl_ae.stages.evaluate import predict_split, workspace_of
from ssl_ae.stages.finetune import method_of
from ssl_ae.stages.fitted_head import fit
from ssl_ae.stages.labels import labels_of
from ssl_ae.stages.pipeline import planned, run_stages
from ssl_ae.stages.predict import finished_method
from ssl_ae.stages.scoring import BATCH_ROWS, predict_rows, score, values_of
from ssl_ae.stages.stored import resolve_stored
from ssl_ae.stages.workspace import Workspace, open_workspace

WHOLE = "recipe"  # the method that is all stages of the recipe, where they build on one another
MODES = get_args(Mode)
CONTROLS = "controls"  # the folder of what they share
NOT_LINKED = ("journal", "mlflow_run_id", "checkpoint", "figures", ".*", "_map.png")  # what is written on, or nobody reads


@dataclass(frozen=True)
class Curve:
    """What all cells of a label curve share."""

    recipe: Recipe
    run: Path
    source: str
    split: str  # that methods are judged on


class Method(Protocol):
    """One line of the curve. `fields` are what its scores depend on, beside data, labels and split; `about` says what it is."""

    name: str
    control: bool

    def about(self, recipe: Recipe) -> str: ...

    def fields(self, ws: Workspace) -> dict[str, Any]: ...

    def scores(self, curve: Curve, recipe: Recipe, folder: Path) -> dict[str, float]:
        """Figures of merit on the curve's split, of what the labels of `recipe` give. `folder` is the cell's own."""
        ...


@dataclass(frozen=True)
class OfRecipe:
    """Stages as `ssl-ae run` makes them after the one pretraining; the last that is finetuned is judged."""

    name: str
    stages: tuple[Stage, ...]
    control = False

    def about(self, recipe: Recipe) -> str:
        return "as `ssl-ae run` makes it"

    def fields(self, ws: Workspace) -> dict[str, Any]:
        tree = ws.resolved.as_dict()
        pretrained = ws.pretrained.record().get("sha256") if ws.pretrained.done else None
        read = ("seed", "model", "finetune", "precision", "components")
        stages = [stage.model_dump(mode="json") for stage in self.stages]
        return {name: tree[name] for name in read} | {"stages": stages, "pretrained": pretrained}

    def scores(self, curve: Curve, recipe: Recipe, folder: Path) -> dict[str, float]:
        for name in ("pretrain", "latents"):
            link(curve.run / name, folder / name)
        chosen = recipe.model_copy(update={"stages": self.stages})
        run_stages(chosen, folder, curve.source, Reporter(silent=True), published=False)
        with open_workspace(recipe, folder, curve.source, Reporter(silent=True), published=False) as ws:
            stage = finished_method(folder, None)
            own = workspace_of(ws, stage)
            return score(predict_split(own, stage.path.name, curve.split), own.labels(curve.split), own.card.y)


@dataclass(frozen=True)
class LabelsOnly:
    """A network on the labels alone, as `baselines` trains it beside every finetuned model."""

    name: str
    changes: dict[str, Any]  # to the recipe, so that its head can be trained by steps
    control = True

    def about(self, recipe: Recipe) -> str:
        training = with_fields(recipe, self.changes)
        seen = "under the perturbations of the recipe" if self.name == AUGMENTED else "on the samples as they are"
        length = f"{training.finetune.epochs} epochs" + (f", {n:,} steps at least" if (n := training.finetune.min_steps) else "")
        return f"encoder and head {training.model.head.name} from scratch on the labels alone, {seen}, {length}"

    def fields(self, ws: Workspace) -> dict[str, Any]:
        tree = with_fields(ws.recipe, self.changes).model_dump(mode="json")
        training = {name: value for name, value in tree["finetune"].items() if name not in UNREAD}
        read = {name: tree[name] for name in ("seed", "model", "precision")}
        return read | {"training": training, "versions": ws.resolved.versions()}

    def scores(self, curve: Curve, recipe: Recipe, folder: Path) -> dict[str, float]:
        trainable = with_fields(recipe, self.changes)
        with open_workspace(trainable, folder, curve.source, Reporter(silent=True), published=False) as ws:
            labels = labels_of(ws)
            own = replace(ws, resolved=networks_of(ws.resolved)[self.name])
            model = train_labels_only(own, labels, own.feed("train", labels.y, labels.weight), self.name)
            return judged(own, predict_rows(model, own.labeled_feed(curve.split)).values, curve.split)


@dataclass(frozen=True)
class PcaLinear:
    """PCA and a linear model on the labels."""

    name: str = PCA
    control = True

    def about(self, recipe: Recipe) -> str:
        return f"{recipe.model.latent_dim} principal components at most, and a linear model of the labels"

    def fields(self, ws: Workspace) -> dict[str, Any]:
        return {"latent_dim": ws.recipe.model.latent_dim, "seed": ws.recipe.seed}

    def scores(self, curve: Curve, recipe: Recipe, folder: Path) -> dict[str, float]:
        with open_workspace(recipe, folder, curve.source, Reporter(silent=True), published=False) as ws:
            linear = fit_linear(ws, labels_of(ws), components_of(ws, curve.run))
            return judged(ws, predict_linear(ws, linear, ws.labeled_feed(curve.split)), curve.split)


@dataclass(frozen=True)
class PcaHead:
    """PCA and a table head that learns from unlabelled rows too: what such a head gives without any network.

    One that compares all samples is taken where it is the recipe's own: no other recipe has asked for the memory."""

    name: str
    head: str  # its full name
    config: Config
    control = True

    def about(self, recipe: Recipe) -> str:
        return f"{self.head} on {recipe.model.latent_dim} principal components at most, without any network"

    def fields(self, ws: Workspace) -> dict[str, Any]:
        version = Registry.discover().find("head", self.head).cls.version
        options = self.config.model_dump(mode="json")
        return PcaLinear().fields(ws) | {"head": self.head, "options": options, "version": version}

    def scores(self, curve: Curve, recipe: Recipe, folder: Path) -> dict[str, float]:
        with open_workspace(recipe, folder, curve.source, Reporter(silent=True), published=False) as ws:
            z = {split: pca_codes(ws, curve.run, split) for split in ("train", curve.split)}
            latent = z["train"].shape[1]
            part = Part(Registry.discover().find("head", self.head), self.config)
            head = part.build(replace(ws.resolved.shapes, latent=latent))
            fit(head, ws, z["train"], labels_of(ws))
            with torch.inference_mode():
                values = torch.cat([values_of(head.predict(some.to(ws.device))) for some in z[curve.split].split(BATCH_ROWS)])
            return judged(ws, values.float().cpu().numpy(), curve.split)


def judged(ws: Workspace, values: np.ndarray, split: str) -> dict[str, float]:
    return score(values, ws.labels(split), ws.card.y)


def methods_of(recipe: Recipe, wanted: Sequence[str] | None, registry: Registry) -> list[OfRecipe]:
    """The lines that the recipe itself asks for, or those that the user names, as they are called on the curve.

    Each finetuning of the recipe is a method by itself, unless later stages build on earlier ones: then all together are one.
    Raises RecipeError for a name that is none.
    """
    if wanted is None:
        return own_methods(recipe)
    known = {method.name: method for method in own_methods(recipe)} if has_finetune(recipe) else {}
    known |= {WHOLE: whole(recipe)} if known else {}
    found = {}
    for name in wanted:
        method = known.get(name) or named(recipe, name, registry)
        if method is None:
            allowed = list(dict.fromkeys([*MODES, *known]))
            raise RecipeError(
                f"--methods {name}: expected some of {listing(allowed)}; joint-alphaA for another alpha, sequential-HEAD for "
                f"another head.{did_you_mean(name, allowed)}"
            )
        found[method.name] = method
    return list(found.values())


def has_finetune(recipe: Recipe) -> bool:
    return any(stage.stage == "finetune" for stage in planned(recipe))


def named(recipe: Recipe, name: str, registry: Registry) -> OfRecipe | None:
    """`joint`; `joint-alpha0.1`; `sequential-logistic`, with another head and its default options. None for other names."""
    heads = {entry.cls.name for entry in registry.of_kind("head")}
    for mode in MODES:
        rest = name.removeprefix(f"{mode}-") if name.startswith(f"{mode}-") else "" if name == mode else None
        alpha = re.fullmatch(r"alpha(\d+(\.\d*)?(e-?\d+)?)", rest or "")
        if rest in heads:
            return of_stage(recipe, {"finetune.mode": mode, "model.head": {"name": rest}})
        if alpha and mode == "joint":
            return of_stage(recipe, {"finetune.mode": mode, "finetune.alpha": float(alpha[1])})
        if rest == "":
            return of_stage(recipe, {"finetune.mode": mode})
    return None


def of_stage(recipe: Recipe, changes: dict[str, Any]) -> OfRecipe:
    """One finetuning, named by its mode, alpha and, where it is not the recipe's, its head."""
    chosen = with_fields(recipe, changes, "stages")
    ours, head = recipe.model.head.name, chosen.model.head.name
    another = "" if head == ours else f"-{head.split('/')[-1]}"
    return OfRecipe(method_of(chosen.finetune) + another, (Stage(stage="finetune", set=changes),))


def own_methods(recipe: Recipe) -> list[OfRecipe]:
    stages = [stage for stage in planned(recipe) if stage.stage != "evaluate"]
    kinds = [stage.stage for stage in stages]
    if not has_finetune(recipe):
        raise RecipeError("stages: the recipe has no finetune stage, so it makes nothing of labels. Name modes with --methods.")
    first = kinds.index("finetune")
    chosen = [with_fields(recipe, stage.set, "stages") for stage in stages[first:]]
    leaves_encoder = any(each.finetune.mode != "sequential" for each in chosen[:-1])
    if leaves_encoder or set(kinds[first:]) != {"finetune"}:
        return [whole(recipe)]
    return _unique([of_stage(recipe, stage.set) for stage in stages[first:]])


def whole(recipe: Recipe) -> OfRecipe:
    return OfRecipe(WHOLE, tuple(stage for stage in planned(recipe) if stage.stage != "evaluate"))


def _unique(methods: Sequence[OfRecipe]) -> list[OfRecipe]:
    """Two of one name are told apart by a number."""
    seen: dict[str, int] = {}
    found = []
    for method in methods:
        seen[method.name] = count = seen.get(method.name, 0) + 1
        found.append(method if count == 1 else replace(method, name=f"{method.name}-{count}"))
    return found


def controls_of(resolved: Resolved, registry: Registry, source: str) -> list[Method]:
    """Everything that the methods have to beat."""
    task = resolved.card.y.task
    fitted = [entry for entry in registry.of_kind("head") if entry.cls.fitted_at_once and task in entry.cls.tasks]
    alone = [entry for entry in fitted if entry.cls.reads_unlabeled and not entry.cls.reads_samples]
    own = resolved.head.full_name
    heads = [each for each in alone if each.full_name == own or not each.cls.reads_all_samples(each.cls.Config())]
    names = [entry.cls.name for entry in heads]
    controls: list[Method] = [*networks(resolved, registry, source), PcaLinear()]
    for entry in heads:
        short = entry.cls.name if names.count(entry.cls.name) == 1 else entry.full_name.replace("/", "-")
        config = resolved.head.config if entry.full_name == own else entry.cls.Config()
        controls.append(PcaHead(f"pca-{short}", entry.full_name, config))
    return controls


def networks(resolved: Resolved, registry: Registry, source: str) -> list[LabelsOnly]:
    """The networks of labels alone. A head that is fitted at once teaches no network, so there it is the default head, and the
    network trains as long and in the same way as the recipe's does on unlabelled rows."""
    changes: dict[str, Any] = {}
    if resolved.head.cls.fitted_at_once:
        head = trained_head(resolved.card.y.task, registry)
        if head is None:
            return []
        pretrain = resolved.recipe.pretrain.model_dump(mode="json")
        training = {name: pretrain[name] for name in Training.model_fields}
        finetune = resolved.recipe.finetune.model_dump(mode="json") | training | {"mode": "end-to-end"}
        changes = {"model.head": {"name": head}, "finetune": finetune | {"solver": {"name": "steps"}}}
        resolved = resolve_stored(with_fields(resolved.recipe, changes), registry, resolved.card, source)
    return [LabelsOnly(name, changes) for name in networks_of(resolved)]


def trained_head(task: str, registry: Registry) -> str | None:
    """A head that is trained by steps, for this kind of labels: the default one where it is of the kind."""
    default = ModelSection().head.name
    able = [entry for entry in registry.of_kind("head") if not entry.cls.fitted_at_once and task in entry.cls.tasks]
    able.sort(key=lambda entry: (entry.cls.name != default, entry.full_name))
    return able[0].full_name if able else None


def components_of(ws: Workspace, run: Path) -> Components:
    """The principal components of the train split, computed once for all cells."""
    facts = [ws.card.fingerprint, ws.resolved.scale, ws.recipe.model.latent_dim, ws.recipe.seed]
    path = run / CONTROLS / f"pca-{files.digest(facts)[:8]}.safetensors"
    with distributed.main_first() as main:
        if main and not path.exists():
            found = fit_components(ws)
            checkpoint.write_weights(path, {name: torch.from_numpy(value) for name, value in vars(found).items()}, "")
    return Components(**{name: value.numpy() for name, value in checkpoint.read_weights(path).items()})


def pca_codes(ws: Workspace, run: Path, split: str) -> torch.Tensor:
    """(N, K) float32."""
    rows = ws.data.split(split)
    return torch.from_numpy(components_of(ws, run).codes(scaled(ws, rows.read(np.arange(rows.rows))))).float()


def link(source: Path, target: Path) -> None:
    """What a finished stage holds under another name: files have one copy, and whoever replaces one replaces it for himself."""
    if not source.exists() or target.exists():
        return
    with files.folder_aside(target) as aside:
        ignored = shutil.ignore_patterns(*NOT_LINKED)
        shutil.copytree(source, aside, dirs_exist_ok=True, ignore=ignored, copy_function=_linked)
        files.move_folder(aside, target)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
