"""Who trains in the rows about steps: our Trainer, a loop over a DataLoader, pythae's trainer, Lightning's.

Everyone sees the same images, ends a step with the same update rule, and reads its loss as it does by default.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card, X
from ssl_ae.data.loading import Feed, Scaling, Table
from ssl_ae.model import build
from ssl_ae.plan import pretraining
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve
from ssl_ae.stages.workspace import no_denormals
from ssl_ae.stepping import micro_batches
from ssl_ae.training import Trainer
from tests.benchmarks.kit import Side, spent

ROWS, SIDE, HIDDEN, LATENT = 8192, 28, 512, 16
PIXELS = SIDE * SIDE
STEPS = 16  # of ours in a call
CPU = torch.device("cpu")


def images() -> np.ndarray:
    """(ROWS, 1, 28, 28) uint8: scikit-learn's digits three times as large, with the empty border that MNIST has too."""
    small = load_digits().images * (255 / 16)
    large = np.pad(np.kron(small, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8)
    return np.resize(large, (ROWS, 1, SIDE, SIDE))


def inputs() -> Tensor:
    """(ROWS, 1, 28, 28) float32 in [0, 1], as peers hold them."""
    return torch.from_numpy(images()).float() / 255


def ours(model: dict[str, Any], batch: int, bf16: bool = False, device: torch.device = CPU) -> Side:
    """Steps of `ssl-ae pretrain`: batch, step, and a reading of the metrics every `log_every` steps."""
    trainer = trainer_of(model, batch, bf16, device)
    run, training = trainer.runs[0], trainer.training
    batches = trainer.feed.batches((run.phase.draw, k) for k in count())

    def steps() -> None:
        with no_denormals():  # as every stage runs
            for _ in range(STEPS):
                trainer.make_step(run, micro_batches(next(batches), 1))
                trainer.progress.step += 1
                if trainer.progress.step % training.log_every == 0:
                    trainer._read()

    return Side(steps, amount=STEPS)


def trainer_of(model: dict[str, Any], batch: int, bf16: bool, device: torch.device) -> Trainer:
    """What `ssl-ae pretrain` builds of a recipe whose data are `images()`."""
    x = images()
    card = Card(name="bench", x=X(kind="image", dtype="uint8", shape=x.shape[1:], range=(0, 255)), splits={})
    tree = {"name": "bench", "data": {"path": "."}, "model": model, "pretrain": {"epochs": 10_000, "batch_size": batch}}
    resolved = resolve(recipes.parse(tree), Registry.discover(), card)
    torch.manual_seed(0)
    fresh = build(resolved, head=False).to(device)
    scaling = Scaling(card.x, resolved.scale).to(device)
    feed = Feed(Table(x), None, scaling, seed=0, device=device, residency="resident")
    plan, training = pretraining(resolved, fresh, ROWS), resolved.recipe.pretrain
    return Trainer(fresh, plan, feed, training, seed=0, device=device, bf16=bf16, replay=True)


class Vae(nn.Module):
    """The same VAE in plain PyTorch: 784-512-16 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def loss(self, x: Tensor) -> Tensor:
        """Nats per row."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        rebuilt = F.binary_cross_entropy_with_logits(self.decoder(z).float(), x.flatten(1), reduction="sum")
        return (rebuilt - 0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()) / len(x)


class ConvAutoencoder(nn.Module):
    """The same convolutional autoencoder in plain PyTorch: 1-32-64 channels, stride 2, K = 16, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 64 * 49),
            nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 3, 2, 1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 3, 2, 1, output_padding=1),
        )

    def loss(self, x: Tensor) -> Tensor:
        """1/2 of the squared error per row; the constant has no gradient."""
        return 0.5 * (self.decoder(self.encoder(x)).float() - x).square().sum() / len(x)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def plain(make: Callable[[], nn.Module], batch: int, bf16: bool = False) -> Side:
    """One step of the loop in every tutorial: DataLoader, Adam, loss.item() each step."""
    torch.manual_seed(0)
    model = make()
    optimizer = adam(model)
    loader = DataLoader(TensorDataset(inputs()), batch_size=batch, shuffle=True)

    def steps():
        while True:
            for (x,) in loader:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = model.loss(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()

    endless = steps()
    return Side(lambda: next(endless) and None)


def pythae_vae(batch: int, device: torch.device = CPU) -> Side:
    """One step of pythae's trainer with its default networks, which are 784-512-16 too; a call is an epoch."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)
    torch.manual_seed(0)
    x = inputs()
    config = VAEConfig(input_dim=(1, SIDE, SIDE), latent_dim=LATENT, reconstruction_loss="bce")
    options = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), num_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-3, no_cuda=device == CPU
    )
    trainer = BaseTrainer(VAE(config), BaseDataset(x, torch.zeros(len(x))), training_config=options)
    trainer.prepare_training()
    trainer.callback_handler.callbacks = trainer.callback_handler.callbacks[:1]  # bars and printed metrics are not the work
    return Side(lambda: trainer.train_step(1) and None, amount=ROWS / batch)


def lightning_vae(batch: int) -> Side:
    """Lightning's Trainer on the plain VAE, without logger, bar and checkpoints; a call is an epoch, its set-up left out."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.started, self.seconds = Vae(), 0.0, 0.0

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.vae.loss(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.vae)

        def on_train_epoch_start(self) -> None:
            self.started = spent()

        def on_train_epoch_end(self) -> None:
            self.seconds = spent() - self.started

    torch.manual_seed(0)
    module = Module()
    loader = DataLoader(TensorDataset(inputs()), batch_size=batch, shuffle=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}

    def epoch() -> float:
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=False, **quiet)
        trainer.fit(module, loader)
        return module.seconds

    return Side(epoch, amount=ROWS / batch)
