"""A softmax head on stored latents, 60,000 x 32: finetune.solver: lbfgs beside scikit-learn and beside cached mini-batches.

Everyone minimises the same objective, mean l_Y + |W|^2 / 2N: scikit-learn's default penalty, C = 1. When to stop is decided on
the train rows alone. The held-out rows only check that the heads are equally good.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from ssl_ae.recipe import Solver
from ssl_ae.registry import Registry
from ssl_ae.solving import solve
from ssl_ae.stages.labels import Labels
from ssl_ae.stages.solved_head import labelled
from ssl_ae.trace import Shapes
from tests.benchmarks.kit import Bar, Row, Side

ROWS, HELD_OUT, LATENT, CLASSES = 60_000, 40_000, 32, 10
DECAY = 1 / ROWS
EPOCHS, BATCH, RATE = 10, 256, 1.0  # of the rates from 0.01 to 1, the one that brought the objective on train lowest
SAME = 1e-3  # nats a row, and accuracy
CPU = torch.device("cpu")
Linear = tuple[np.ndarray, np.ndarray]  # W (C, K), b (C,)


@dataclass(frozen=True)
class Split:
    """Latents and classes."""

    z: np.ndarray  # (N, K) float32
    y: np.ndarray  # (N,) int64

    def judged(self, linear: Linear) -> tuple[float, float]:
        """Mean l_Y in nats, and accuracy."""
        weight, bias = (torch.from_numpy(part).double() for part in linear)
        logits = torch.from_numpy(self.z).double() @ weight.T + bias
        y = torch.from_numpy(self.y)
        return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Quality:
    """How good a head is."""

    objective: float  # on train
    loss: float  # held out
    accuracy: float  # held out

    @classmethod
    def of(cls, linear: Linear, train: Split, held_out: Split) -> Quality:
        return cls(train.judged(linear)[0] + DECAY / 2 * float(np.square(linear[0]).sum()), *held_out.judged(linear))

    def __str__(self) -> str:
        return f"objective {self.objective:.4f}, held out {self.loss:.4f} nats, accuracy {100 * self.accuracy:.2f} %"


def latents() -> tuple[Split, Split]:
    """Codes of ten overlapping classes that lean on one another, with deviations from 3 down to 0.03: a fixed draw."""
    random = np.random.default_rng(0)
    centers = 0.42 * random.normal(size=(CLASSES, LATENT))
    axes = np.linalg.qr(random.normal(size=(LATENT, LATENT)))[0] * np.geomspace(3, 0.03, LATENT)
    y = random.integers(CLASSES, size=ROWS + HELD_OUT)
    z = ((centers[y] + random.normal(size=(len(y), LATENT))) @ axes.T).astype(np.float32)
    return Split(z[:ROWS], y[:ROWS]), Split(z[ROWS:], y[ROWS:])


def ours(train: Split, told: Callable[[int, float, float], None] = lambda *_: None) -> Callable[[], Linear]:
    """As `ssl-ae finetune` does it, from the table of latents to the head's weights."""
    softmax = Registry.discover().find("head", "softmax").cls
    head = softmax(softmax.Config(), Shapes((1,), LATENT, CLASSES))

    def fit() -> Linear:
        minimum = solve(head, labelled(train.z, Labels(train.y, None), CPU), Solver(name="lbfgs"), DECAY, told)
        assert minimum.converged
        return head.linear.weight.detach().numpy(), head.linear.bias.detach().numpy()

    return fit


def products(train: Split, passes: int) -> Side:
    """The two matrix products of each of so many passes: logits, and the gradient from theirs."""
    z, weight, gradient = torch.from_numpy(train.z), torch.randn(CLASSES, LATENT), torch.randn(CLASSES, ROWS)

    def work() -> None:
        for _ in range(passes):
            weight @ z.T
            gradient @ z

    return Side(work)


def scikit_learn(train: Split, **options: float) -> Callable[[], Linear]:
    """LogisticRegression by its default solver, which stops after 100 iterations unless told otherwise, with a warning."""

    def fit() -> Linear:
        with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):
            model = LogisticRegression(**options).fit(train.z, train.y)
        return model.coef_, model.intercept_

    return fit


def cached_batches(train: Split) -> Callable[[], Linear]:
    """The plain PyTorch loop over latents in memory: Adam, a learning rate that falls to 0."""
    z, y = torch.from_numpy(train.z), torch.from_numpy(train.y)

    def fit() -> Linear:
        torch.manual_seed(0)
        linear = nn.Linear(LATENT, CLASSES)
        optimizer = torch.optim.Adam(linear.parameters(), lr=RATE, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-ROWS // BATCH))
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROWS).split(BATCH):
                loss = F.cross_entropy(linear(z[rows]), y[rows]) + DECAY / 2 * linear.weight.square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return linear.weight.detach().numpy(), linear.bias.detach().numpy()

    return fit


def rows() -> Iterator[Row]:
    train, held_out = latents()
    version, passes = f"scikit-learn {metadata.version('scikit-learn')}", []
    fits = {
        "ours": ours(train, lambda number, *_: passes.append(number)),
        version: scikit_learn(train),
        f"converged {version}": scikit_learn(train, max_iter=10_000),
        "cached batches": cached_batches(train),
    }
    quality = {name: Quality.of(fit(), train, held_out) for name, fit in fits.items()}
    check(quality["ours"], quality[f"converged {version}"])
    yield Row(
        metric=f"linear head on stored latents, {ROWS:,} x {LATENT}",
        unit="s",
        sides={
            **{name: Side(lambda fit=fit: fit() and None) for name, fit in {**fits, "ours": ours(train)}.items()},
            "limit": products(train, len(passes)),
        },
        bars=(Bar("scikit-learn", 1 / 3), Bar("converged scikit-learn", 1 / 3)),
        note="limit: the matrix products of as many passes; " + "; ".join(f"{name}: {found}" for name, found in quality.items()),
    )


def check(found: Quality, reference: Quality) -> None:
    """Raises AssertionError unless a head is as good as the reference: the objective, held-out loss, held-out accuracy."""
    for name in ("objective", "loss", "accuracy"):
        mine, theirs = getattr(found, name), getattr(reference, name)
        assert abs(mine - theirs) < SAME, f"{name}: {mine:.5f} against {theirs:.5f}"
