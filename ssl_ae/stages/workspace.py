"""What every stage works with: a resolved recipe, its data, a locked run folder, a device, and someone to tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ae import distributed, files, runs
from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card
from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import aligned
from ssl_ae.data.loading import Feed, Scaling
from ssl_ae.data.pack import pack
from ssl_ae.data.remote import Remote, opened
from ssl_ae.data.sources import PackOptions
from ssl_ae.errors import CheckpointError, DataError, RecipeError
from ssl_ae.memory import keep_freed
from ssl_ae.model import Model, build, check_layers
from ssl_ae.progress import Reporter
from ssl_ae.recipe import Recipe
from ssl_ae.registry import Registry
from ssl_ae.resolve import Resolved
from ssl_ae.runs import StageFolder
from ssl_ae.stages.outcome import Outcome
from ssl_ae.stages.stored import card_with_labels, keep_labels, label_file, read_model, resolve_stored
from ssl_ae.tracking import Tracker, live_store

AUTOENCODER = ("encoder.", "decoder.")  # how the names of its weights begin


@dataclass
class Workspace:
    resolved: Resolved
    data: DataSet
    run: Path
    device: torch.device
    reporter: Reporter
    _feeds: dict[str, Feed] = field(default_factory=dict)
    published: bool = True  # draws figures and tells MLflow; not where a run is one of many whose scores alone are kept

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def card(self) -> Card:
        return self.resolved.card

    @property
    def pretrained(self) -> StageFolder:
        """The stage whose encoder this is: RUN/pretrain, or the finetuning RUN/finetune/METHOD where the folder is that."""
        return StageFolder(self.run if runs.is_stage(self.run) else self.run / "pretrain")

    @property
    def holder(self) -> Path:
        """The run folder, also of a finetuning inside it."""
        return runs.holder_of(self.run)

    @cached_property
    def scaling(self) -> Scaling:
        return Scaling(self.card.x, self.resolved.scale).to(self.device)

    def feed(
        self, split: str, y: np.ndarray | None = None, weight_y: np.ndarray | None = None, guess: np.ndarray | None = None
    ) -> Feed:
        """Batches of a split on this rank, with these labels and guesses or none."""
        samples = self.data.split(split)
        return Feed(
            samples,
            y,
            self.scaling,
            seed=self.recipe.seed,
            device=self.device,
            residency=self.recipe.data.residency,
            weight_y=weight_y,
            guess=guess,
            rank=distributed.rank(),
            world=distributed.world(),
            ahead=samples.expect if samples.is_remote else None,
        )

    def labels(self, split: str) -> np.ndarray:
        """Every label that is known of a split, for judging: the data's own; where it has none, those of the recipe's file.

        (N,) int64 with -1, or (N, T) float32 with NaN, where unknown. Pseudo-labels count as unknown.
        """
        given = label_file(self.recipe)
        if self.data.card.y is not None or given is None:
            return self.data.labels(split)
        return aligned(self.data.read_labels(given).without_guesses(), self.data.split(split).keys)

    def labeled_feed(self, split: str) -> Feed:
        """A split with every label that is known of it: for judging, never for training."""
        if split not in self._feeds:
            self._feeds[split] = self.feed(split, self.labels(split))
        return self._feeds[split]

    def fresh_model(self, head: bool) -> Model:
        """Weights that the recipe's seed decides. Raises RecipeError where a regularizer acts on layers that are not there."""
        torch.manual_seed(self.recipe.seed)
        model = build(self.resolved, head)
        check_layers(model, self.resolved.shapes)
        return model.to(self.device)

    def load_pretrained(self, model: Model) -> Model:
        """The pretrained encoder and decoder of this run into a model, whatever head and regularizers it has."""
        weights = read_model(self.resolved, self.pretrained_weights())
        wanted = {name: weight for name, weight in weights.items() if name.startswith(AUTOENCODER)}
        missing, unexpected = model.load_state_dict(wanted, strict=False)
        stray = [name for name in missing if name.startswith(AUTOENCODER)] + list(unexpected)
        if stray:
            raise CheckpointError(
                f"{self.pretrained.path} does not fit this recipe: {', '.join(stray[:5])}. Use the recipe it was made with."
            )
        return model

    def pretrained_weights(self) -> Path:
        """Raises CheckpointError before pretraining is done, and where its weights are damaged."""
        if not self.pretrained.done:
            raise CheckpointError(
                f"{self.run} holds no pretrained model. Run `ssl-ae pretrain RECIPE --out {self.run}` first, "
                "or name a run with --from."
            )
        return self.pretrained.weights()

    def pretrain_fields(self) -> dict[str, Any]:
        """What decides the pretrained weights."""
        tree = self.resolved.as_dict()
        model = {name: value for name, value in tree["model"].items() if name != "head"}
        components = {name: entry["version"] for name, entry in tree["components"].items() if not name.startswith("head ")}
        return {
            "seed": tree["seed"],
            "data": {"card_sha256": self.card.fingerprint, "scale": self.resolved.scale},
            "model": model,
            "pretrain": tree["pretrain"],
            "precision": tree["precision"],
            "components": components,
        }

    def claim(self, stage: StageFolder, inputs: runs.Inputs, restart: bool) -> str:
        """`new`, `resume` or `done`, the same on every rank; a stage keeps its recipe beside it."""
        state = None
        with distributed.main_first() as main:
            if main:
                changes = {} if restart else stage.changes(inputs)
                state = stage.begin(inputs, restart)
                if changes:
                    self.reporter.warn(f"--force: {stage.path} goes on with another recipe:\n{runs.shown(changes)}")
                # a run is read again by the recipe of its pretraining, whichever stage came first
                own = {stage.path, self.run} if stage == self.pretrained else {stage.path}
                for folder in (stage.path, self.run):
                    # also on resuming: a kill may have come before, or between the two files
                    there = all((folder / name).exists() for name in (runs.RECIPE, runs.CARD))
                    if not there or (folder in own and (state == "new" or changes)):
                        self.keep_recipe(folder)
        state = distributed.from_main(state)
        if state == "resume":
            self.reporter.say(f"going on with {stage.path}")
        return state

    def keep_recipe(self, folder: Path) -> None:
        tree = self.resolved.as_dict()
        tree["data"] |= {"path": again(self.data.path), "card_sha256": self.card.fingerprint}
        if isinstance(tree["data"]["labels"], str) and tree["data"]["labels"] != "all":
            tree["data"]["labels"] = str(Path(tree["data"]["labels"]).absolute())
        keep_labels(self.recipe, folder)  # first: a folder is complete once it has its recipe and its card
        files.write_text(folder / runs.RECIPE, recipes.to_yaml(tree))
        files.write_json(folder / runs.CARD, self.card.model_dump(mode="json"))

    @contextlib.contextmanager
    def tracker(self, stage: StageFolder, name: str, splits: Sequence[str] = ("train", "val")) -> Iterator[Tracker]:
        """The stage's MLflow run, with the splits it reads as inputs; what it could not deliver becomes a warning."""
        tracker = Tracker(
            stage.path,
            experiment=self.recipe.name,
            run_folder=self.holder,
            stage=name,
            parameters=self.resolved.as_dict(),
            rank=distributed.rank(),
            deliver=self.published,
        )
        with tracker:
            for split in splits:
                if split in self.card.splits:
                    rows = self.card.splits[split].rows
                    # MLflow takes inputs of one name and digest for the same: the split belongs to the name
                    name, place = f"{self.card.name}-{split}", again(self.data.path)
                    tracker.dataset(name, self.card.fingerprint, place, split, rows)
            own = stage.path / runs.RECIPE
            tracker.artifact(own if own.exists() else self.run / runs.RECIPE)
            yield tracker
            if not distributed.is_main():
                tracker.close()
            distributed.barrier()  # rank 0 delivers what every rank has written
        for warning in tracker.warnings:
            if warning not in self.reporter.warnings:  # of several stages that meet the same silent store, one tells it
                self.reporter.warn(warning)

    def outcome(self, command: str, stage: StageFolder, status: str = "done", **more: Any) -> Outcome:
        outputs = {"run": self.run, "stage": stage.path, "model": stage.path / runs.MODEL, "recipe": stage.path / runs.RECIPE}
        return Outcome(
            command,
            self.run,
            status,
            outputs={name: path for name, path in outputs.items() if path.exists()} | more.pop("outputs", {}),
            metrics=stage.metrics(),
            mlflow_run_id=stage.mlflow_run_id(),
            warnings=list(self.reporter.warnings),
            more=more,
        )


@contextlib.contextmanager
def open_workspace(
    recipe: Recipe,
    run: Path,
    source: str = "recipe",
    reporter: Reporter | None = None,
    registry: Registry | None = None,
    published: bool = True,
) -> Iterator[Workspace]:
    """Join the ranks, open the data (packing it on first use), resolve the recipe, lock the run folder.

    Raises RecipeError, PluginError, DataError or CheckpointError before anything is written to the run folder.
    """
    reporter, registry = reporter or Reporter(), registry or Registry.discover()
    live_store()  # a store that cannot work is told now
    keep_freed()
    with no_denormals(), distributed.process_group(recipe.device) as device, contextlib.ExitStack() as stack:
        reporter.silent = reporter.silent or not distributed.is_main()
        data, resolved = open_data(in_one_precision(recipe, run), registry, source, reporter)
        stack.enter_context(only_writer(run, reporter))
        yield Workspace(resolved, data, run, device, reporter, published=published)


@contextlib.contextmanager
def no_denormals() -> Iterator[None]:
    """Numbers below 1e-38 count as 0 on the processor inside the block, also in the threads that torch starts in it.

    The averages of an optimizer shrink towards them wherever a gradient stays 0 (a dead unit, a pixel of the border), and
    processors compute with them by the slow way: after 1,000 steps on MNIST every step took a fifth longer.
    """
    before = torch.ones(()).mul_(1e-39) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(bool(before))


@contextlib.contextmanager
def only_writer(run: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of a run folder for all ranks."""
    with contextlib.ExitStack() as stack:
        with distributed.main_first() as main:
            if main:
                stack.enter_context(runs.lock(run, reporter.say))
        yield


def open_data(recipe: Recipe, registry: Registry, source: str, reporter: Reporter) -> tuple[DataSet, Resolved]:
    """The data, packed on first use, and the recipe resolved against its card."""
    data = None
    with distributed.main_first() as main:
        if main:  # it reads the shards to their end, so that others on its machine need not
            pack_on_first_use(recipe, registry, reporter)
            data = DataSet.open(recipe.data.path, tolerance=tolerance_of(recipe))
    data = data or DataSet.open(recipe.data.path, tolerance=tolerance_of(recipe))
    if data.card.split("train").rows == 0:
        raise DataError(f"{data.path}: the split train holds no samples. Add some, and pack the source again.")
    _check_same_data(recipe, data)
    resolved = resolve_stored(recipe, registry, card_with_labels(recipe, data), source)
    for line in data.losses:
        reporter.warn(line)
    return data, resolved


def in_one_precision(recipe: Recipe, run: Path) -> Recipe:
    """`precision: auto` is what the run was begun in, else what suits the device: on every rank what rank 0 finds.

    Stored, compared and told as that, so that no run mixes the two, wherever it goes on.
    """
    if recipe.precision != "auto":
        return recipe
    begun = run / runs.RECIPE
    if begun.exists():
        taken = recipes.load(begun).precision
    else:
        taken = "bf16" if distributed.computes_bf16(distributed.choose_device(recipe.device)) else "fp32"
    return recipe.model_copy(update={"precision": distributed.from_main(taken)})


def pack_on_first_use(recipe: Recipe, registry: Registry, reporter: Reporter) -> None:
    if recipe.data.source is None:
        return
    path = opened(recipe.data.path)
    if isinstance(path, Remote):
        raise RecipeError(
            f"data.source = {recipe.data.source}: data.path is {path.url}, where nothing can be packed. Leave one out."
        )
    if (path / runs.CARD).exists():
        return
    reporter.say(f"packing {recipe.data.source} into {path} (first use)")
    pack(recipe.data.source, path, PackOptions(), registry.sources())


def again(place: Path | str) -> str:
    """How a data set is found from any folder: its URL, or its absolute path."""
    return str(place.absolute() if isinstance(place, Path) else place)


def tolerance_of(recipe: Recipe) -> Tolerance:
    return Tolerance(recipe.data.damaged == "skip", recipe.data.damaged_limit)


def _check_same_data(recipe: Recipe, data: DataSet) -> None:
    first = distributed.from_main(data.card.fingerprint)
    if first != data.card.fingerprint:
        raise DataError(
            f"{data.path} is not the same on every machine: rank 0 reads a data set of fingerprint {first[:12]}, "
            f"rank {distributed.rank()} one of {data.card.fingerprint[:12]}. Copy it again."
        )
    expected = recipe.data.card_sha256
    if expected is not None and data.card.fingerprint != expected:
        raise DataError(
            f"{data.path} is not the data this run was made with (its card's fingerprint is {data.card.fingerprint[:12]}, "
            f"expected {expected[:12]}). Pack the same source again, or start a new run with --out."
        )
