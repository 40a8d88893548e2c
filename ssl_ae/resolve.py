"""A recipe meets the installed plugins and the data's card: every complaint that can be made before step 0 is made here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from ssl_ae import likelihood
from ssl_ae.components import Component, Config
from ssl_ae.data.card import Card
from ssl_ae.errors import RecipeError, listing
from ssl_ae.recipe import ComponentEntry, Recipe, explain
from ssl_ae.registry import Entry, Registry
from ssl_ae.trace import Need, Shapes

IN_SHARDS = ("adamw", "adam")  # optimizers


@dataclass(frozen=True)
class Part:
    """A component chosen by the recipe, with its options complete."""

    entry: Entry
    config: Config
    weight: float = 1.0
    warmup_steps: int = 0
    layers: tuple[str, ...] | None = None
    stored_version: int | None = None  # of the weights of a run that is read again

    @property
    def cls(self) -> type[Component]:
        return self.entry.cls

    @property
    def full_name(self) -> str:
        return self.entry.full_name

    def build(self, shapes: Shapes) -> Component:
        try:
            component = self.cls(self.config, shapes)
        except ValueError as error:
            raise RecipeError(f"{self.entry.kind} {self.full_name}: {error}") from error
        if self.layers is not None:
            component.layers = self.layers
        return component

    def as_dict(self) -> dict[str, Any]:
        engine = {"weight": self.weight, "warmup_steps": self.warmup_steps, "layers": list(self.layers) if self.layers else None}
        options = engine if self.entry.kind == "regularizer" else {}
        return {"name": self.full_name, **options, **self.config.model_dump(mode="json")}


@dataclass(frozen=True)
class Resolved:
    """A recipe whose components exist, whose options are complete and which fits its data."""

    recipe: Recipe
    card: Card
    encoder: Part
    decoder: Part
    regularizers: tuple[Part, ...]
    head: Part
    shapes: Shapes

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.encoder, self.decoder, *self.regularizers, self.head)

    @property
    def scale(self) -> str:
        """How samples are scaled: range, standard or none."""
        chosen = self.recipe.data.scale
        if chosen != "auto":
            return chosen
        return "standard" if self.card.x.kind == "vector" else "range"

    @property
    def x_range(self) -> tuple[float, float]:
        """Smallest and largest value that the model can meet."""
        return {"range": (0.0, 1.0), "standard": (-float("inf"), float("inf")), "none": self.card.x.range}[self.scale]

    def as_dict(self) -> dict[str, Any]:
        """The recipe with full names, every default, and the versions of its components: what a run folder keeps."""
        tree = self.recipe.model_dump(mode="json")
        tree["model"] |= {
            "encoder": self.encoder.as_dict(),
            "decoder": self.decoder.as_dict(),
            "regularizers": [part.as_dict() for part in self.regularizers],
            "head": self.head.as_dict(),
        }
        tree["components"] = self.versions()
        return tree

    def versions(self) -> dict[str, dict[str, Any]]:
        return {
            f"{part.entry.kind} {part.full_name}": {"version": part.cls.version, "distribution": part.entry.plugin.origin}
            for part in self.parts
        }


def resolve(recipe: Recipe, registry: Registry, card: Card, source: str = "recipe") -> Resolved:
    """Raises RecipeError or PluginError with every complaint, one a line."""
    model = recipe.model
    shapes = Shapes(
        x=card.x.shape,
        latent=model.latent_dim,
        classes=len(card.y.names) if card.y and card.y.task == "classes" else None,
        targets=len(card.y.names) if card.y and card.y.task != "classes" else None,
    )
    encoder = _part(registry, "encoder", model.encoder, "model.encoder", source)
    decoder = _part(registry, "decoder", model.decoder, "model.decoder", source)
    decoder = replace(decoder, config=decoder.cls.mirrored(decoder.config, encoder.config))
    regularizers = tuple(
        replace(
            _part(registry, "regularizer", entry, f"model.regularizers.{i}", source),
            weight=entry.weight,
            warmup_steps=entry.warmup_steps,
            layers=entry.layers,
        )
        for i, entry in enumerate(model.regularizers)
    )
    head = _part(registry, "head", model.head, "model.head", source)
    resolved = Resolved(recipe, card, encoder, decoder, regularizers, head, shapes)
    complaints = list(_complaints(resolved))
    if complaints:
        raise RecipeError("\n".join(f"{source}: {complaint}" for complaint in complaints))
    return resolved


def _part(registry: Registry, kind: str, entry: ComponentEntry, place: str, source: str) -> Part:
    found = registry.find(kind, entry.name, f"{source}: {place}.name")
    try:
        return Part(found, found.cls.Config.model_validate(entry.options))
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, found.cls.Config, source, place))) from error


def _complaints(resolved: Resolved) -> Iterator[str]:
    for part in resolved.parts:
        yield from part.cls.check(part.config, resolved)
    low, high = resolved.x_range
    family = resolved.decoder.cls.likelihood(resolved.decoder.config)
    if family in likelihood.UNIT_INTERVAL and (low < 0 or high > 1):
        yield (
            f"model.decoder.likelihood = {family}: expects values in [0, 1], but data.scale = {resolved.scale} gives "
            f"[{low:g}, {high:g}]. Set data.scale: range, or the gaussian likelihood."
        )
    yield from _complaints_of_slices(resolved)
    yield from {"ddp": lambda _: (), "fsdp": _complaints_of_shards}[resolved.recipe.parallel](resolved)
    yield from {"steps": lambda _: (), "lbfgs": _complaints_of_minimum}[resolved.recipe.finetune.solver.name](resolved)
    for i, part in enumerate(resolved.regularizers):
        place = f"model.regularizers.{i} ({part.full_name})"
        if "penalty" not in part.cls.verbs and (part.weight, part.warmup_steps) != (1.0, 0):
            yield f"{place}: weight and warmup_steps have no effect, because it has no penalty. Remove them."
        if Need.TEACHER in part.cls.needs and resolved.recipe.finetune.ema is None:
            yield f"{place} needs a teacher, the averaged model. Set finetune.ema, for example 0.99."
    y = resolved.card.y
    if y is not None and y.task not in resolved.head.cls.tasks:
        yield (
            f"model.head.name = {resolved.head.full_name}: predicts {listing(sorted(resolved.head.cls.tasks))}, "
            f"but the labels of {resolved.card.name} are of kind {y.task}."
        )


def _complaints_of_slices(resolved: Resolved) -> Iterator[str]:
    encoder, decoder, epochs = resolved.encoder, resolved.decoder, resolved.recipe.pretrain.slice_epochs
    slices, theirs = encoder.cls.parts(encoder.config), decoder.cls.parts(decoder.config)
    if slices == 1 and epochs:
        yield f"pretrain.slice_epochs = {epochs}: encoder {encoder.full_name} has no slices to train one by one. Remove it."
    elif slices > 1 and epochs != 0 and theirs != slices:
        yield (
            f"model.decoder.name = {decoder.full_name}: the encoder trains in {slices} slices, the decoder must have as many; "
            f"this one has {theirs}. Take a decoder that mirrors it (mlp, without widths), or set pretrain.slice_epochs: 0."
        )


def _complaints_of_shards(resolved: Resolved) -> Iterator[str]:
    """What needs whole weights where a rank has a share of them."""
    recipe, cure = resolved.recipe, "or set parallel: ddp."
    for name, training in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        if training.ema is not None:
            yield f"{name}.ema = {training.ema:g}: the average is not kept in shards (parallel: fsdp). Remove it, {cure}"
        if (chosen := training.optimizer.name) not in IN_SHARDS:
            yield (
                f"{name}.optimizer.name = {chosen}: torch's fused kernel of it takes no shards (parallel: fsdp). "
                f"Set {listing(IN_SHARDS)}, {cure}"
            )
    for i, part in enumerate(resolved.regularizers):
        if "project" in part.cls.verbs:
            yield (
                f"model.regularizers.{i} ({part.full_name}): changes whole weights after a step, and a rank has a share of them "
                f"(parallel: fsdp). Remove it, {cure}"
            )
    if recipe.compile is True:
        yield f"compile = true: does not go with parallel: fsdp. Set compile: false, {cure}"


def _complaints_of_minimum(resolved: Resolved) -> Iterator[str]:
    training, head = resolved.recipe.finetune, resolved.head
    place = f"finetune.solver.name = {training.solver.name}"
    if training.mode != "sequential":
        yield (
            f"{place}: brings a head on stored latents to its minimum, so finetune.mode must be sequential, not {training.mode}. "
            "Set finetune.mode: sequential, or finetune.solver.name: steps."
        )
    if head.cls.fitted_at_once:
        yield f"{place}: head {head.full_name} is fitted in a way of its own. Set finetune.solver.name: steps, its default."
    elif not head.cls.convex(head.config):
        yield (
            f"{place}: needs a head for which l_Y is convex and linear in the code; {head.full_name} with these options is not. "
            "Take softmax, bernoulli, or gaussian with variance: unit; or set finetune.solver.name: steps."
        )
    if training.early_stopping is not None:
        yield (
            f"finetune.early_stopping with {place}: a head at its minimum has no epochs to stop after. "
            "Remove it (finetune.optimizer.weight_decay keeps a head from following few labels too far), or set "
            "finetune.solver.name: steps."
        )
