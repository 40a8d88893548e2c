"""The self-test: a tiny training on rows made in memory, through the very parts that a real one uses."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssl_ae import recipe as recipes
from ssl_ae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ssl_ae.data.card import Card, X, Y
from ssl_ae.data.loading import Feed, Scaling, Table
from ssl_ae.distributed import choose_device
from ssl_ae.model import Model, build, on_codes
from ssl_ae.plan import head_training, pretraining
from ssl_ae.registry import Registry
from ssl_ae.resolve import Resolved, resolve
from ssl_ae.training import Trainer
from ssl_ae.validation import validate

CLASSES, SIDE, ROWS, HELD_OUT = 10, 8, 1_000, 200
LABELS = 100
NOISE = 0.15  # standard deviation of each pixel around its class's picture, of values in [0, 1]
TRAINING = {"epochs": 10, "batch_size": 100, "log_every": 10}


@dataclass(frozen=True)
class Trial:
    """What came out. Losses are l_X in nats a row on the rows that were held out, before and after."""

    device: str
    steps: int
    first_loss: float
    last_loss: float
    same_bits: bool
    labels: int
    accuracy: float
    classes: int


def run_trial(device: str = "auto") -> Trial:
    """Pretrain; do it again from a checkpoint on disk, in the middle; train a head on the codes."""
    chosen = choose_device(device)
    x, y = pictures()
    found = resolved()
    scaling = Scaling(found.card.x, "range").to(chosen)

    def feed(rows: slice, labels: np.ndarray | None = None) -> Feed:
        return Feed(Table(x[rows]), labels, scaling, seed=0, device=chosen, residency="resident")

    train, held_out = feed(slice(0, ROWS)), feed(slice(ROWS, None))
    saved: list[Checkpoint] = []
    with tempfile.TemporaryDirectory(prefix="ssl-ae-doctor-") as folder:
        place = Path(folder) / "checkpoint"

        def keep(checkpoint: Checkpoint) -> None:
            saved.append(checkpoint)
            if len(saved) == TRAINING["epochs"] // 2:  # the only one on disk, so the one that is gone on from
                save_checkpoint(place, checkpoint)

        whole = trainer_of(found, train, chosen, keep)
        before = validate(whole.model, whole.runs[0].phase.objective, held_out)
        progress = whole.run()
        after = validate(whole.model, whole.runs[0].phase.objective, held_out)
        resumed = trainer_of(found, train, chosen, seed=1)  # other weights: what it ends with comes from the checkpoint
        resumed.restore(load_checkpoint(place, []))
        resumed.run()
    theirs = resumed.model.state_dict()
    return Trial(
        device=chosen.type,
        steps=progress.step,
        first_loss=before["loss"],
        last_loss=after["loss"],
        same_bits=all(torch.equal(value, theirs[name]) for name, value in whole.model.state_dict().items()),
        labels=LABELS,
        accuracy=accuracy_of_head(found, whole.model, train, held_out, y),
        classes=CLASSES,
    )


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures (N, 1, 8, 8) uint8, one a class with noise around it, and their classes (N,) int64."""
    rng = np.random.default_rng(0)
    coarse = rng.random((CLASSES, SIDE // 2, SIDE // 2))
    y = rng.integers(0, CLASSES, ROWS + HELD_OUT)
    x = np.kron(coarse, np.ones((2, 2)))[y] + rng.normal(0, NOISE, (len(y), SIDE, SIDE))
    return (x.clip(0, 1) * 255).round().astype(np.uint8)[:, None], y


def resolved() -> Resolved:
    """A recipe that is all defaults but for its length."""
    tree = {
        "name": "doctor",
        "data": {"path": "memory"},
        "pretrain": TRAINING,
        "finetune": TRAINING | {"epochs": 20, "optimizer": {"lr": 0.05}},
    }
    tree["model"] = {"latent_dim": 8}
    x = X(kind="image", dtype="uint8", shape=(1, SIDE, SIDE), range=(0, 255))
    y = Y(task="classes", names=tuple(f"class {i}" for i in range(CLASSES)))
    return resolve(recipes.parse(tree, "self-test"), Registry.discover(), Card(name="doctor", x=x, y=y, splits={}), "self-test")


def trainer_of(found: Resolved, feed: Feed, device: torch.device, save=lambda checkpoint: None, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    model = build(found, head=False).to(device)
    plan = pretraining(found, model, feed.split.rows)
    return Trainer(model, plan, feed, found.recipe.pretrain, seed=0, device=device, replay=True, save=save)


def accuracy_of_head(found: Resolved, model: Model, train: Feed, held_out: Feed, y: np.ndarray) -> float:
    """Of a head trained on the codes of few labelled rows, on the rows that were held out."""
    codes = {}
    for name, feed in (("train", train), ("held out", held_out)):
        (batch,) = feed.in_order(feed.split.rows)
        with torch.no_grad():
            codes[name] = model.features(batch.x).cpu().numpy()
    known = np.where(np.arange(ROWS) < LABELS, y[:ROWS], -1)
    torch.manual_seed(0)
    network = on_codes(found.head.build(found.shapes), found.shapes).to(train.device)
    network.head.prepare(torch.from_numpy(known[:LABELS]))

    def feed_of(name: str, labels: np.ndarray) -> Feed:
        return Feed(Table(codes[name]), labels, lambda z: z, seed=0, device=train.device, residency="resident")

    training = found.recipe.finetune
    plan = head_training(training, ROWS, LABELS)
    trainer = Trainer(network, plan, feed_of("train", known), training, seed=0, device=train.device)
    trainer.run()
    return validate(trainer.result, plan.phases[0].objective, feed_of("held out", y[ROWS:]))["accuracy"]
