"""The network that a head fitted at once may compare itself with: the pretrained encoder, trained end to end on the labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_ae import distributed
from ssl_ae.components import Head
from ssl_ae.data.loading import Feed, Table
from ssl_ae.model import Model, frozen
from ssl_ae.plan import finetuning
from ssl_ae.stages.scoring import BATCH_ROWS, values_of
from ssl_ae.stages.training_run import train
from ssl_ae.stages.workspace import Workspace
from ssl_ae.trace import UNLABELED, known


@dataclass(frozen=True)
class Rival:
    """`components.Network` with the optimizer and batches of the recipe's finetune section, on the labelled rows alone."""

    ws: Workspace
    model: Model  # whose weights below the head `take` replaces
    head: Head  # fresh, copied for each training
    name: str

    def held_out(self, y: Tensor, folds: Tensor, steps: int) -> Tensor:
        """y (N,), folds (R, L) of its labelled rows -> their probabilities, (R, L, C), by networks trained on the other folds."""
        feed = self._feed(y)
        p = torch.empty(*folds.shape, self.ws.resolved.shapes.outputs)
        for repeat, fold in enumerate(folds):
            for number in fold.unique():
                held = fold == number
                seen = y.clone()
                seen[known(y).nonzero()[held, 0]] = UNLABELED
                network = self._trained(seen, steps, f"{self.name}, network {int(number) + 1} of {len(fold.unique())}")
                with frozen(network), torch.inference_mode():
                    for batch in feed.in_order(BATCH_ROWS, held.nonzero()[:, 0].numpy()):
                        p[repeat, batch.row.cpu()] = values_of(network.predict(batch.x)).float().cpu()
        return p

    def take(self, y: Tensor, steps: int) -> Head:
        """Train on the labels y (N,), make that network the model's own, and return the head on top of it."""
        network = self._trained(y, steps, f"{self.name}, network")
        own = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
        self.model.load_state_dict(own, strict=False)
        return network.head

    def _feed(self, y: Tensor) -> Feed:
        """The labelled rows."""
        at = known(y)
        return Feed(
            Table(self.ws.data.split("train").read(at.nonzero()[:, 0].numpy())),
            y[at].numpy(),
            self.ws.scaling,
            seed=self.ws.recipe.seed,
            device=self.ws.device,
            residency="resident",
            rank=distributed.rank(),
            world=distributed.world(),
        )

    def _trained(self, y: Tensor, steps: int, name: str) -> Model:
        """End to end, whatever `finetune.epochs`: rows without labels do not count. No row is left to stop early by."""
        feed = self._feed(y)
        model = self.ws.load_pretrained(self.ws.fresh_model(head=False))
        model.head = copy.deepcopy(self.head).to(self.ws.device)
        model.head.prepare(feed.y)
        training = self.ws.recipe.finetune.model_copy(update={"epochs": 1, "min_steps": steps, "early_stopping": None})
        resolved = replace(self.ws.resolved, recipe=self.ws.recipe.model_copy(update={"finetune": training}))
        plan = finetuning(resolved, model, "end-to-end", feed.split.rows, feed.split.rows)
        return train(self.ws, model, plan, feed, training, name=name)[0]
