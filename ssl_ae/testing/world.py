"""The worlds a component is tried in: a resolved recipe, samples of a shape and labels of a task, all small and in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ssl_ae import recipe as recipes
from ssl_ae.components import Component, Decoder, Encoder, Head, Regularizer, TableHead
from ssl_ae.data.card import Card, Split, X, Y
from ssl_ae.data.sources import Source
from ssl_ae.errors import RecipeError
from ssl_ae.hookspecs import hookimpl
from ssl_ae.model import Model, build
from ssl_ae.randomness import seed_draws
from ssl_ae.registry import Registry
from ssl_ae.resolve import Resolved, resolve
from ssl_ae.testing import companions
from ssl_ae.testing.check import Finding
from ssl_ae.trace import UNLABELED, Batch, known

KINDS: dict[str, type] = {
    "encoder": Encoder,
    "decoder": Decoder,
    "regularizer": Regularizer,
    "head": Head,
    "table head": TableHead,
    "source": Source,
}
# distinct primes, so that no swapped axis passes
SHAPES = {"image": (3, 7, 5), "vector": (11,), "signal": (2, 13)}
LATENTS = (17, 41, 157, 5)  # the first that the component does not refuse is used; 5: as many as there are classes
TRIES = 10_000  # recipes offered for one shape before the component counts as refusing it: half a second
NAMES = {"classes": tuple("abcde"), "regression": tuple("uvw"), "multilabel": tuple("uvw")}
ROWS = 19


@dataclass(frozen=True)
class Sample:
    """Rows for a component to work on; slices like a tensor."""

    x: Tensor  # (N, *shape) in [0, 1]
    z: Tensor  # (N, K) around one centre a class
    y: Tensor  # (N,) class | (N, T)

    def __getitem__(self, rows: slice | Tensor) -> Sample:
        return Sample(self.x[rows], self.z[rows], self.y[rows])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self) -> Batch:
        """Every other row labelled."""
        y = self.y.clone()
        y[1::2] = UNLABELED if y.dim() == 1 else torch.nan
        return Batch(x=self.x, y=y)


@dataclass(frozen=True)
class World:
    """A recipe in which the component under test plays its part, resolved for samples of one shape and labels of one task."""

    kind: str
    resolved: Resolved

    @property
    def task(self) -> str:
        return self.resolved.card.y.task

    @property
    def name(self) -> str:
        """As messages call it."""
        card, shapes = self.resolved.card, self.resolved.shapes
        return f"{card.x.kind}s {card.x.shape}, K = {shapes.latent}" + (f", {self.task}" if "head" in self.kind else "")

    def model(self, seed: int = 0) -> Model:
        """A fresh model, its head prepared (or fitted) on labels of the task."""
        seed_draws(seed)
        model = build(self.resolved, head=True)
        sample = self.sample(100)
        if self.kind == "table head":
            fit(model.head, sample)
        elif self.kind == "head":
            model.head.prepare(sample.y)
        return model

    def part(self, model: Model) -> Component:
        """The component under test."""
        parts = {"encoder": model.encoder, "decoder": model.decoder, "head": model.head, "table head": model.head}
        return parts[self.kind] if self.kind in parts else model.regularizers[0]

    def sample(self, rows: int = ROWS) -> Sample:
        """The same rows each time, whatever torch's generator."""
        generator = torch.Generator().manual_seed(rows)
        shapes, names = self.resolved.shapes, NAMES[self.task]
        label = torch.arange(rows) % len(names)
        z = 4.0 * torch.eye(len(names), shapes.latent)[label] + 0.3 * torch.randn(rows, shapes.latent, generator=generator)
        y = {
            "classes": lambda: label,
            "regression": lambda: 100.0 + 7.0 * torch.randn(rows, len(names), generator=generator),
            "multilabel": lambda: torch.randint(2, (rows, len(names)), generator=generator).float(),
        }[self.task]()
        return Sample(torch.rand(rows, *shapes.x, generator=generator), z, y)


def fit(head: TableHead, sample: Sample) -> None:
    """As the finetune stage does: samples go to a head that reads them."""
    every = head.reads_all_samples(head.config)
    x = [sample.x[... if every else known(sample.y)].flatten(1)] if every or head.reads_samples else []
    rival = head.rival()
    head.fit(sample.z, sample.y, *x, *([] if rival is None else [Untrained(rival)]))


@dataclass(frozen=True)
class Untrained:
    """A `components.Network` that knows nothing: a head should do without it."""

    rival: Head

    def held_out(self, y: Tensor, folds: Tensor, steps: int) -> Tensor:
        outputs = self.rival.shapes.outputs
        return torch.full((*folds.shape, outputs), 1 / outputs)

    def take(self, y: Tensor, steps: int) -> Head:
        return self.rival


Partner = type | tuple[type, Mapping[str, Any]]


class Subject:
    """The component under test with its options, and the worlds it accepts."""

    def __init__(self, cls: type, kind: str, partners: Sequence[Partner], options: Mapping[str, Any]) -> None:
        self.cls, self.kind, self.options = cls, kind, options
        self.partners = [(partner, {}) if isinstance(partner, type) else partner for partner in partners]

    @cached_property
    def worlds(self) -> list[World]:
        """One a shape of samples, and for heads one a task, each the first that `check` does not refuse.

        Raises Finding when it refuses all of them, PluginError when the registry does.
        """
        registry = self.registry()
        tasks = sorted(self.cls.tasks) if "head" in self.kind else ["classes"]
        found, complaint = [], ""
        for (sample, shape), task in itertools.product(SHAPES.items(), tasks):
            if "head" in self.kind and any(world.task == task for world in found):
                continue  # a head reads latents: one shape is enough
            card = Card(
                name="contract",
                x=X(kind=sample, dtype="float32", shape=shape, range=(0.0, 1.0)),
                y=Y(task=task, names=NAMES[task]),
                splits={"train": Split(rows=ROWS, shards=())},
            )
            for tree in itertools.islice(self._recipes(), TRIES):
                try:
                    found.append(World(self.kind, resolve(recipes.parse(tree), registry, card, "contract")))
                    break
                except RecipeError as error:
                    complaint = complaint or str(error)
        if not found:
            raise Finding(f"refused every recipe that the kit offers; the first complaint: {complaint}")
        return found

    def registry(self) -> Registry:
        """The companions, the partners and the component itself as a plugin. Raises PluginError when the registry refuses."""
        registry = Registry()
        registry.add("kit", companions.Plugin())
        registry.add("subject", plugin_of([self.cls, *(partner for partner, _ in self.partners)]))
        return registry

    def _recipes(self) -> Iterator[dict[str, Any]]:
        """Recipes with the component in its place, plainest first: those that differ least from the kit's own components."""
        itself = self._entry(self.cls, self.options)
        parts = {
            "encoder": [{"name": "kit/plain", "posterior": posterior} for posterior in ("point", "diag")],
            "decoder": [{"name": "kit/plain"}],
            "head": [{"name": "kit/plain"}],
        }
        for partner, options in self.partners:
            if partner.kind in parts:
                parts[partner.kind].append(self._entry(partner, options))
        if self.cls.kind in parts:
            parts[self.cls.kind] = [itself]
        beside = [self._entry(cls, options) for cls, options in self.partners if cls.kind == "regularizer"]
        own = [itself] if self.kind == "regularizer" else []
        sets = [[[*own, *chosen] for chosen in itertools.combinations(beside, size)] for size in range(len(beside) + 1)]
        axes = [*([choices[:1], choices[1:]] for choices in (LATENTS, *parts.values())), sets]
        for changes in range(sum(len(axis) - 1 for axis in axes) + 1):
            for latent, encoder, decoder, head, regularizers in _with_changes(axes, changes):
                model = {"latent_dim": latent, "encoder": encoder, "decoder": decoder, "head": head, "regularizers": regularizers}
                yield {"name": "contract", "data": DATA, "model": model, "pretrain": PRETRAIN, "finetune": FINETUNE}

    def _entry(self, cls: type[Component], options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "name": f"subject/{cls.name}"}


def _with_changes(axes: Sequence[Sequence[Sequence[Any]]], changes: int) -> Iterator[tuple[Any, ...]]:
    """One choice of each axis, with so many changes in all; `axis[n]` holds the choices that count as n."""
    if not axes:
        yield from [()] if changes == 0 else []
        return
    for here, choices in enumerate(axes[0][: changes + 1]):
        for choice in choices:
            for rest in _with_changes(axes[1:], changes - here):
                yield (choice, *rest)


DATA = {"path": ".", "scale": "none"}
PRETRAIN = {"slice_epochs": 0}  # the plain decoder has no slices
FINETUNE = {
    "mode": "joint",
    "alpha": 1.0,
    "epochs": 1,
    "batch_size": 8,
    "optimizer": {"name": "adam", "lr": 0.01},
    "schedule": {"name": "constant"},
    "ema": 0.9,
    "log_every": 1,
}


def plugin_of(classes: Sequence[type]) -> object:
    """An object with the hooks that offer these classes."""

    def offering(kind: str) -> Any:
        bases = [base for name, base in KINDS.items() if kind in name]
        return lambda: [cls for cls in dict.fromkeys(classes) if issubclass(cls, tuple(bases))]

    plugin = type("Plugin", (), {})()
    for kind in ("encoder", "decoder", "regularizer", "head", "source"):
        setattr(plugin, f"ssl_ae_{kind}s", hookimpl(offering(kind)))
    return plugin
