"""What is trained, in which order: a Phase is an objective with parameters and rows, a Plan is phases in sequence or rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ssl_ae.data.loading import Draw
from ssl_ae.errors import RecipeError
from ssl_ae.model import Model, Slice, layers_of
from ssl_ae.objective import RECONSTRUCTION, SUPERVISED, Objective, Weight, penalty
from ssl_ae.recipe import Finetune, Mode, Training
from ssl_ae.resolve import Resolved
from ssl_ae.trace import Need, Over, matches


@dataclass(frozen=True)
class Phase:
    """One objective, minimised over `trainable` parameters (name patterns) on rows drawn so, for so many passes over the rows."""

    name: str
    objective: Objective
    trainable: tuple[str, ...]
    draw: Draw
    epochs: int
    slice: int | None = None  # the part of the model that trains, on what the parts below it give; None for the whole

    @property
    def prefix(self) -> str:
        """Of its metrics: what a slice measures is not what the whole does."""
        return "" if self.slice is None else f"{self.name}/"


@dataclass(frozen=True)
class Plan:
    """Phases one after another, or (`rotate`) one step of each in turn, for equally many passes."""

    phases: tuple[Phase, ...]
    rows: int  # of the train split
    batch: int  # rows of a step: one pass is rows / batch steps, because batches are stretches of an endless stream
    rotate: bool = False

    @property
    def epochs(self) -> int:
        """Passes in all; phases in rotation make each of theirs together."""
        return self.phases[0].epochs if self.rotate else sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        return self.epoch_end(self.epochs)

    def steps_of(self, phase: Phase) -> int:
        """Steps that a phase makes."""
        return self._passes(phase.epochs)

    def epoch_end(self, epoch: int) -> int:
        """The step at which so many passes are complete."""
        if self.rotate:
            return self._passes(epoch) * len(self.phases)
        steps = 0
        for phase in self.phases:
            steps += self._passes(min(epoch, phase.epochs))
            epoch -= min(epoch, phase.epochs)
        return steps

    def ending(self, epoch: int) -> tuple[Phase, ...]:
        """The phases whose pass number `epoch`, from 1, is: all of them in rotation."""
        if self.rotate:
            return self.phases
        for phase in self.phases:
            if epoch <= phase.epochs:
                return (phase,)
            epoch -= phase.epochs
        raise ValueError(f"the plan has {self.epochs} epochs")

    def at(self, step: int) -> tuple[int, int]:
        """Which phase makes this step, and how many it has made before."""
        if self.rotate:
            return step % len(self.phases), step // len(self.phases)
        for index, phase in enumerate(self.phases):
            if step < self.steps_of(phase):
                return index, step
            step -= self.steps_of(phase)
        raise ValueError(f"the plan has {self.steps} steps")

    def _passes(self, count: int) -> int:
        """Steps of one phase that see every row so many times."""
        return math.ceil(Fraction(count * self.rows, self.batch))


def passes(training: Training, rows: int, size: int) -> int:
    """Passes over so many rows in batches of `size`: as many as the recipe says, or as make `min_steps` steps."""
    return max(training.epochs, (training.min_steps - 1) * size // rows + 1)


AUTOENCODER = ("encoder.*", "decoder.*", "regularizers.*")
CLASSIFIER = ("encoder.*", "head.*")
EVERYTHING = ("*",)


def pretraining(resolved: Resolved, model: Model, rows: int) -> Plan:
    """l_X + penalties on every row, labels unused: of each slice of the model in turn, where it has any, and of the whole."""
    training = resolved.recipe.pretrain
    size = min(training.batch_size, rows)
    epochs = passes(training, rows, size)
    below = epochs if training.slice_epochs is None else training.slice_epochs
    objective = RECONSTRUCTION + penalties(resolved, model, of_prediction=False) + weight_penalties(resolved, model)
    phases = [
        Phase(f"slice-{k + 1}", of_slice(objective, resolved, model, k), AUTOENCODER, Draw(size), below, slice=k)
        for k in range(len(model.encoder.slices()) if below else 0)
    ]
    whole = Phase("pretrain", objective, AUTOENCODER, Draw(size), epochs)
    return Plan((*phases, whole), rows, size)


def of_slice(objective: Objective, resolved: Resolved, model: Model, index: int) -> Objective:
    """The terms that a slice can have: a penalty of layers that all lie in other slices has no part in it."""
    there = layers_of(Slice(model, index), resolved.shapes)
    absent = {
        regularizer.penalty
        for regularizer in model.regularizers
        if "penalty" in regularizer.verbs and not any(matches(layer, regularizer.layers) for layer in there)
    }
    return Objective(tuple(term for term in objective.terms if term.of not in absent))


def finetuning(resolved: Resolved, model: Model, mode: Mode, rows: int, labeled: int) -> Plan:
    """The plan of a mode that runs the encoder, over `rows` train rows of which `labeled` have a label.

    joint:       l_Y + alpha * (l_X + its penalties); alpha multiplies the reconstruction side, so a VAE's bound stays a bound
    alternate:   one step on l_X + its penalties, one step on l_Y, in turn
    end-to-end:  l_Y alone

    Penalties that read the prediction stand beside l_Y, penalties of parameters alone stand by themselves. Steps of l_Y
    without l_X draw labelled rows alone, and a batch of uniform ones beside them where a penalty is of any row. One pass counts
    as many steps in every mode, so that methods compare at equal steps.
    """
    training = resolved.recipe.finetune
    rebuild = RECONSTRUCTION + penalties(resolved, model, of_prediction=False)
    classify = SUPERVISED + penalties(resolved, model, of_prediction=True)
    weights = weight_penalties(resolved, model)
    size = min(training.batch_size, rows)
    epochs = passes(training, rows, size)
    of_any_row = any(term.over is not Over.LABELED for term in classify.terms)
    beside_labels = Draw(size if of_any_row else 0, min(training.batch_size, labeled))
    if mode == "joint":
        extra = round(training.labeled_fraction * size)
        objective = classify + training.alpha * rebuild + weights
        phases = (Phase("joint", objective, EVERYTHING, Draw(size - extra, extra), epochs),)
    elif mode == "alternate":
        phases = (
            Phase("reconstruct", rebuild + weights, AUTOENCODER, Draw(size), epochs),
            Phase("classify", classify + weights, classifier(model), beside_labels, epochs),
        )
    elif mode == "end-to-end":
        phases = (Phase("classify", classify + weights, classifier(model), beside_labels, epochs),)
    else:
        raise RecipeError(f"finetune.mode = {mode}: the encoder does not train in this mode.")
    return Plan(phases, rows, size, rotate=mode == "alternate")


def labels_only(resolved: Resolved, model: Model, rows: int, labeled: int) -> Plan:
    """End-to-end without the terms of unlabelled rows: what the labels give by themselves, in as many steps."""
    training = resolved.recipe.finetune
    size = min(training.batch_size, rows)
    draw = Draw(0, min(training.batch_size, labeled))
    classify = SUPERVISED + penalties(resolved, model, of_prediction=True)
    of_labels = Objective(tuple(term for term in classify.terms if term.over is Over.LABELED))
    objective = of_labels + weight_penalties(resolved, model)
    return Plan((Phase("classify", objective, classifier(model), draw, passes(training, rows, size)),), rows, size)


def head_training(training: Finetune, rows: int, labeled: int) -> Plan:
    """l_Y over the head alone, on stored latents."""
    size = min(training.batch_size, rows)
    draw = Draw(0, min(training.batch_size, labeled))
    return Plan((Phase("classify", SUPERVISED, ("head.*",), draw, passes(training, rows, size)),), rows, size)


def classifier(model: Model) -> tuple[str, ...]:
    """The parameters between x and p(y|x) that l_Y can reach."""
    encoder = model.encoder
    return (*CLASSIFIER, "decoder.*") if encoder.reads_decoder and encoder.differentiable else CLASSIFIER


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
