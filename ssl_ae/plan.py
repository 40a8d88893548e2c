"""What is trained, in which order: a Phase is an objective with parameters and rows, a Plan is phases in sequence or rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ssl_ae.data.loading import Draw
from ssl_ae.errors import RecipeError
from ssl_ae.model import Model
from ssl_ae.objective import RECONSTRUCTION, SUPERVISED, Objective, Weight, penalty
from ssl_ae.recipe import Finetune, Mode
from ssl_ae.resolve import Resolved
from ssl_ae.trace import Need, Over


@dataclass(frozen=True)
class Phase:
    """One objective, minimised over `trainable` parameters (name patterns) on rows drawn so."""

    name: str
    objective: Objective
    trainable: tuple[str, ...]
    draw: Draw


@dataclass(frozen=True)
class Plan:
    """Phases one after another, or (`rotate`) one step of each in turn."""

    phases: tuple[Phase, ...]
    epochs: int
    rows: int  # of the train split
    batch: int  # rows of a step: one pass is rows / batch steps, because batches are stretches of an endless stream
    rotate: bool = False

    @property
    def steps(self) -> int:
        return self.epoch_end(self.epochs) * (1 if self.rotate else len(self.phases))

    @property
    def phase_steps(self) -> int:
        """Steps that each phase makes."""
        return self.steps // len(self.phases)

    def epoch_end(self, epoch: int) -> int:
        """The step at which so many passes are complete (of each phase in turn, where the plan is a sequence)."""
        if self.rotate:
            return self._passes(epoch) * len(self.phases)
        phases, epochs = divmod(epoch, self.epochs)
        return phases * self._passes(self.epochs) + self._passes(epochs)

    def _passes(self, count: int) -> int:
        """Steps of one phase that see every row so many times."""
        return math.ceil(Fraction(count * self.rows, self.batch))

    def at(self, step: int) -> tuple[int, int]:
        """Which phase makes this step, and how many it has made before."""
        if self.rotate:
            return step % len(self.phases), step // len(self.phases)
        return divmod(step, self.phase_steps)


AUTOENCODER = ("encoder.*", "decoder.*", "regularizers.*")
CLASSIFIER = ("encoder.*", "head.*")
EVERYTHING = ("*",)


def pretraining(resolved: Resolved, model: Model, rows: int) -> Plan:
    """l_X + penalties on every row; labels unused."""
    training = resolved.recipe.pretrain
    objective = RECONSTRUCTION + penalties(resolved, model, of_prediction=False) + weight_penalties(resolved, model)
    phase = Phase("pretrain", objective, AUTOENCODER, Draw(min(training.batch_size, rows)))
    return Plan((phase,), training.epochs, rows, min(training.batch_size, rows))


def finetuning(resolved: Resolved, model: Model, mode: Mode, rows: int, labeled: int) -> Plan:
    """The plan of a mode that runs the encoder, over `rows` train rows of which `labeled` have a label.

    joint:       l_Y + alpha * (l_X + its penalties); alpha multiplies the reconstruction side, so a VAE's bound stays a bound
    alternate:   one step on l_X + its penalties, one step on l_Y, in turn
    end-to-end:  l_Y alone

    Penalties that read the prediction stand beside l_Y, penalties of parameters alone stand by themselves. One pass counts as
    many steps in every mode, so that methods compare at equal steps.
    """
    training = resolved.recipe.finetune
    rebuild = RECONSTRUCTION + penalties(resolved, model, of_prediction=False)
    classify = SUPERVISED + penalties(resolved, model, of_prediction=True)
    weights = weight_penalties(resolved, model)
    only_labeled = Draw(0, min(training.batch_size, labeled))
    size = min(training.batch_size, rows)
    if mode == "joint":
        extra = round(training.labeled_fraction * size)
        objective = classify + training.alpha * rebuild + weights
        phases = (Phase("joint", objective, EVERYTHING, Draw(size - extra, extra)),)
    elif mode == "alternate":
        phases = (
            Phase("reconstruct", rebuild + weights, AUTOENCODER, Draw(size)),
            Phase("classify", classify + weights, CLASSIFIER, only_labeled),
        )
    elif mode == "end-to-end":
        phases = (Phase("classify", classify + weights, CLASSIFIER, only_labeled),)
    else:
        raise RecipeError(f"finetune.mode = {mode}: the encoder does not train in this mode.")
    return Plan(phases, training.epochs, rows, min(training.batch_size, rows), rotate=mode == "alternate")


def head_training(training: Finetune, rows: int, labeled: int) -> Plan:
    """l_Y over the head alone, on stored latents."""
    phase = Phase("classify", SUPERVISED, ("head.*",), Draw(0, min(training.batch_size, labeled)))
    return Plan((phase,), training.epochs, rows, min(training.batch_size, rows))


def penalties(resolved: Resolved, model: Model, of_prediction: bool) -> Objective:
    """The regularizers' penalties of data: those that read the prediction, or the others."""
    return _sum_of(
        resolved,
        model,
        lambda r: r.over is not Over.MODEL and (Need.PREDICTION in r.needs or Need.TEACHER in r.needs) == of_prediction,
    )


def weight_penalties(resolved: Resolved, model: Model) -> Objective:
    """The regularizers' penalties of parameters alone."""
    return _sum_of(resolved, model, lambda r: r.over is Over.MODEL)


def _sum_of(resolved: Resolved, model: Model, wanted) -> Objective:
    total = Objective()
    for part, regularizer in zip(resolved.regularizers, model.regularizers, strict=True):
        if "penalty" in regularizer.verbs and wanted(regularizer):
            total = total + penalty(regularizer, Weight(part.weight, part.warmup_steps))
    return total
