"""The engine without files: resolved recipes over rows in memory, regularizers of our own, and the real Trainer in float64."""

import dataclasses

import numpy as np
import torch

import ssl_ae
from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card, X, Y
from ssl_ae.data.loading import Feed, Table
from ssl_ae.model import Model, build
from ssl_ae.plan import Plan, finetuning, pretraining
from ssl_ae.registry import Entry, Plugin, Registry
from ssl_ae.resolve import Part, Resolved, resolve
from ssl_ae.training import Listener, Trainer
from ssl_ae.validation import validate

CPU = torch.device("cpu")
REGISTRY = Registry.discover()
CLASSES = 3
RHO = 0.2

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0}
CONSTANT = {"name": "constant"}


class MeanCode(ssl_ae.Regularizer):
    """KL(rho || mean activation of sigmoid codes): a nonlinear function of a mean over the whole step."""

    name = "mean_code"
    over = ssl_ae.Over.STEP
    needs = frozenset({ssl_ae.Need.STEP_MEAN})

    def penalty(self, trace):
        m = trace.step_mean(torch.sigmoid(trace.q.mean))
        return (RHO * (RHO / m).log() + (1 - RHO) * ((1 - RHO) / (1 - m)).log()).sum()


class Contraction(ssl_ae.Regularizer):
    """|dE[z]/dx|_F^2 of each row by autograd (Rifai et al. 2011, eq. 3)."""

    name = "contraction"
    needs = frozenset({ssl_ae.Need.INPUT_GRAD})

    def penalty(self, trace):
        rows = [
            torch.autograd.grad(trace.q.mean[:, k].sum(), trace.batch.x, create_graph=True)[0].flatten(1).square().sum(1)
            for k in range(trace.q.mean.shape[1])
        ]
        return torch.stack(rows).sum(0)


class Keep(Listener):
    """Remembers what a listener is told."""

    def __init__(self):
        self.measures, self.epochs = [], []

    def measured(self, step, values):
        self.measures.append((step, values))

    def epoch_ended(self, epoch, step, values):
        self.epochs.append((epoch, step, values))


def rows(count=23, shape=(7,), seed=0, labeled=1.0, classes=CLASSES):
    """x (N, *shape) float64 and y (N,) with -1 outside the labelled part."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, *shape))
    y = random.integers(classes, size=count)
    y[random.permutation(count)[round(labeled * count) :]] = -1
    return x, y


def cut(batch, groups) -> list[ssl_ae.Batch]:
    """The batch's rows in the given groups of row numbers."""
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    groups = [torch.as_tensor(group, dtype=torch.int64) for group in groups]
    return [ssl_ae.Batch(**{name: value[group] for name, value in fields.items()}) for group in groups]


def recipe(model=None, pretrain=None, finetune=None, **more):
    return recipes.parse(
        {
            "name": "kit",
            "data": {"path": "nowhere", "scale": "none"},
            "model": {
                "latent_dim": 5,
                "encoder": {"name": "mlp", "widths": [11], "activation": "tanh"},
                "decoder": {"name": "mlp"},
                **(model or {}),
            },
            "pretrain": {"epochs": 2, "batch_size": 8, "optimizer": SGD, "schedule": CONSTANT, **(pretrain or {})},
            "finetune": {"epochs": 2, "batch_size": 8, "optimizer": SGD, "schedule": CONSTANT, **(finetune or {})},
            **more,
        }
    )


def resolved(shape=(7,), y=None, extra=(), **sections) -> Resolved:
    """A recipe that met a card. `extra` holds (regularizer class, weight) or (class, weight, options) no plugin owns."""
    kind = {1: "vector", 2: "signal", 3: "image"}[len(shape)]
    y = y or Y(task="classes", names=tuple("abcdefg"[:CLASSES]))
    card = Card(name="kit", x=X(kind=kind, dtype="float32", shape=shape, range=(0.0, 1.0)), y=y, splits={})
    found = resolve(recipe(**sections), REGISTRY, card)
    return dataclasses.replace(found, regularizers=(*found.regularizers, *(part(*entry) for entry in extra)))


def part(cls, weight=1.0, options=None, warmup_steps=0, layers=None) -> Part:
    entry = Entry("regularizer", cls, Plugin("kit", "kit", "1"))
    return Part(entry, cls.Config(**(options or {})), weight, warmup_steps, layers)


def fresh(found: Resolved, head=True, seed=0, dtype=torch.float64) -> Model:
    torch.manual_seed(seed)
    return build(found, head).to(dtype)


def feed_of(x, y=None, seed=3, dtype=torch.float64, **more) -> Feed:
    return Feed(Table(x), y, lambda stored: stored.to(dtype), seed=seed, device=CPU, **({"residency": "resident"} | more))


def plan_of(found: Resolved, model: Model, mode: str, feed: Feed) -> Plan:
    """`mode`: pretrain, or one of finetune's that run the encoder."""
    if mode == "pretrain":
        return pretraining(found, model, feed.split.rows)
    return finetuning(found, model, mode, feed.split.rows, len(feed.labeled_rows))


def trainer_of(found: Resolved, mode: str, feed: Feed, model: Model | None = None, plan: Plan | None = None, **more) -> Trainer:
    model = model or fresh(found)
    training = found.recipe.pretrain if mode == "pretrain" else found.recipe.finetune
    return Trainer(model, plan or plan_of(found, model, mode, feed), feed, training, seed=5, device=CPU, **more)


def judge(trainer: Trainer, feed: Feed):
    """What a stage passes as `validate`."""
    return lambda model, objective=trainer.runs[0].phase.objective: validate(model, objective, feed)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, atol=0.0):
    """Dicts of tensors, equal to the bit or within `atol`."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if atol == 0.0:
            assert torch.equal(actual[name], value), name
        else:
            torch.testing.assert_close(actual[name], value, rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
