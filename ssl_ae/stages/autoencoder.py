"""The pretrained encoder and decoder of a run, to be used without the data they learned from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ssl_ae import recipe as recipes
from ssl_ae import runs
from ssl_ae.data.card import Card
from ssl_ae.data.loading import Scaling
from ssl_ae.distributed import choose_device
from ssl_ae.errors import CheckpointError
from ssl_ae.model import Model, build
from ssl_ae.progress import Reporter
from ssl_ae.registry import Registry
from ssl_ae.resolve import Resolved
from ssl_ae.runs import StageFolder
from ssl_ae.stages.stored import on_this_machine, read_model, recipe_of, resolve_stored


@dataclass(frozen=True)
class Autoencoder:
    """RUN/pretrain in evaluation mode, whatever head the run has or lacks."""

    model: Model
    scaling: Scaling  # stored samples to model inputs and back
    resolved: Resolved
    device: torch.device

    @classmethod
    def load(cls, run: Path, reporter: Reporter) -> Autoencoder:
        """Raises CheckpointError for a folder that is no run, or whose pretraining is not done."""
        recipe_of(run, Reporter(silent=True))  # the pretraining's own recipe is the one that counts
        stage = StageFolder(run / "pretrain")
        if not stage.done:
            raise CheckpointError(
                f"{run} holds no pretrained model. Run `ssl-ae pretrain RECIPE --out {run}` first, "
                "or name the run that it was finetuned from."
            )
        recipe = on_this_machine(recipes.load(stage.path / runs.RECIPE), reporter)
        resolved = resolve_stored(recipe, Registry.discover(), Card.load(stage.path), str(stage.path / runs.RECIPE))
        device = choose_device(recipe.device)
        model = build(resolved, head=False)
        model.load_state_dict(read_model(resolved, stage.weights()))
        return cls(model.to(device).eval(), Scaling(resolved.card.x, resolved.scale).to(device), resolved, device)
