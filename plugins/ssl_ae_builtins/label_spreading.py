"""Labels that spread over a graph of the stored latents: unlabelled rows carry them to rows that no label is near."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import one_hot

import ssl_ae
from ssl_ae_builtins.label_graph import METRICS, graph_of, nearest, weights

ALPHAS, NEIGHBOURS = (0.2, 0.5, 0.9, 0.99), (5, 10, 20)  # that `auto` tries, beside every metric
MANY = 100  # labels from which on it chooses k and metric, too
SAFE_ALPHA, SAFE_K, SAFE_METRIC = 0.9, 10, "cosine"  # where labels are too few to choose by
FOLDS = 5  # of the cross-validation: a class with fewer labels would have none in some fold
MOST_STEPS = 200  # that a label travels
TRIAL_STEPS = 50  # before sharpening on trial: it forgets where it began
STILL = 1e-4  # of a probability: what a step may still change in the end
LOOK = 10  # steps between two looks at that: a look costs half a step
LEAST = 1e-6  # probability of the least likely class: a graph knows nothing for certain
DIFFUSION, SHARPNESS = 5, 4  # steps of a round of sharpening, and the power that ends it
EXPONENTS = 2.0 ** torch.linspace(-4, 6, 81)

Share = Annotated[float, Field(gt=0)]
Weigh = Callable[[Tensor], Tensor]  # labels of each class (C,) -> what each of them weighs (C,)


class Setting(NamedTuple):
    """What cross-validation may choose."""

    metric: str
    k: int
    alpha: float


class Choice(NamedTuple):
    """A setting, the exponent that calibrates it, and what each of those that were compared costs a held-out label, in nats."""

    setting: Setting
    exponent: float
    losses: Mapping[Setting, float] = {}


class Graphs(NamedTuple):
    """What labels travel over: first over `wide`, then, to sharpen their borders, over `narrow`; S (N, N) each."""

    wide: Tensor
    narrow: Tensor


class LabelSpreading(ssl_ae.TableHead):
    """F <- alpha S F + (1 - alpha) Y over a graph of nearest latents, to its limit (Zhou et al. 2004, sec. 2).

    A_ij = similarity(z_i, z_j)^power over centred latents where j is among the k nearest of i, W = A + A', S = D^-1/2 W D^-1/2,
    and Y has a 1 for each label; 200 steps at most. The similarity is the cosine, or exp(-|z_i - z_j|^2 / s_i^2) with s_i the
    distance of the k-th neighbour. Rows of F divided by their sums are the probabilities of the train rows. With a
    `prior`, rows and columns are scaled in turn until every class has its share of the rows (Sinkhorn 1967). A new sample is
    the weighted vote of its k nearest train rows (Delalleau et al. 2005, eq. 6), so no other new sample has a say in it.

    With `class_mass: equal` a label that spreads is divided by how many its class has, so that none wins a border by having been
    labelled more often: for labels that were not drawn at random (as Wang, Jebara & Chang 2008 do, but without the degree of a
    node). By 50 labels of MNIST, 3 to 8 a class, that `suggest` chose, the first graph of `mnist_100` errs on 1.53 % of the train
    rows, with `labels` on 1.60 % (18 choices); by 50 that were drawn as they come on 3.0 and 4.5 % (18 draws); by five a class on
    1.54 %.

    `sharpen` rounds of 5 steps p <- S p and p <- p^4, the labels held, move borders between classes to where the graph has few
    edges (threshold dynamics: Merkurjev et al. 2013, alg. 1, with a soft threshold). Which row of a cluster has the label then
    matters little: on MNIST 100 labels err on 1.89 +- 0.01 % of the train rows over 8 draws, without on 2.2 +- 0.2 %.

    Where two classes have five labels, what is `auto` is chosen by 5-fold cross-validation on the labels (before sharpening; a
    class of fewer is never held out), and probabilities are calibrated: raised to the power that makes held-out labels likeliest
    (Guo et al. 2017, sec. 4.2). The safe setting holds unless another is better by more than the standard error of the
    difference. k and metric wait for 100 labels: over seven tables and their latents a choice by 20 or 50 made probabilities of
    unseen rows worse (log-loss 0.71 for 0.66), by 100, 200 and 400 better (0.34 for 0.35, 0.29 for 0.31, 0.29 for 0.31).
    """

    name = "label_spreading"
    reads_unlabeled = True
    fits_on = frozenset({"cpu", "cuda"})  # no other multiplies by a sparse matrix

    class Config(ssl_ae.Config):
        k: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            "auto",
            description="nearest latents a row is joined to; auto: "
            f"from {MANY} labels on by cross-validation among {NEIGHBOURS}, else {SAFE_K}",
        )
        metric: Literal["cosine", "euclidean", "auto"] = Field(
            "auto",
            description=f"by which latents are near; auto: from {MANY} labels on by cross-validation, else {SAFE_METRIC}",
        )
        power: float = Field(4.0, gt=0, description="of the similarity: a larger one listens to the nearest alone")
        alpha: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = Field(
            "auto", description=f"how far labels travel; auto: by cross-validation among {ALPHAS}, else {SAFE_ALPHA}"
        )
        sharpen: int = Field(0, ge=0, description="rounds that move the borders between classes to gaps of the graph; 20 is many")
        class_mass: Literal["labels", "equal"] = Field(
            "labels",
            description="what the labels of a class weigh together; labels: as many as they are, for rows drawn as they come; "
            "equal: as much as those of any other class, for labels that were chosen",
        )
        prior: Literal["none", "uniform", "labels"] | tuple[Share, ...] = Field(
            "none", description="share of each class: unknown, all alike, as among the labels, or a list of numbers"
        )

    def fit(self, z: Tensor, y: Tensor, *x: Tensor) -> None:
        """z (N, K), y (N,) with UNLABELED = -1; classes without a label get next to no probability. x: as `graphs` needs it."""
        known = y != ssl_ae.UNLABELED
        labels = z.new_zeros(len(y), self.shapes.classes)
        labels[known] = one_hot(y[known], self.shapes.classes).float()
        center = z.mean(0)
        graphs, choice = self._chosen(z - center, y, *x)
        setting, exponent, _ = choice
        counts = labels.sum(0)
        weight = self._weigh(counts)
        mass = sharpened(graphs.narrow, labels, spread(graphs.wide, labels * weight, setting.alpha), self.config.sharpen)
        p = calibrated(probabilities(mass, counts * weight / counts.sum()), exponent)
        if self.config.prior != "none":
            p = balanced(p, self._prior(counts / counts.sum()))
        self.keep("center", center)
        self.keep("codes", METRICS[setting.metric].codes(z - center))
        self.keep("p", p)
        self.keep("metric", torch.tensor([*METRICS].index(setting.metric)))
        self.keep("k", torch.tensor(setting.k))
        self.found = told(self.name, self.config, choice, int(known.sum()))

    def predict(self, z: Tensor) -> Distribution:
        """(B, K) -> Categorical, (B,)."""
        metric = [*METRICS][int(self.metric)]
        z = z.float() - self.center
        products, rows = nearest(self.codes, z, metric, int(self.k))
        weight = weights(products, z, metric, self.config.power)
        votes = (self.p[rows] * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        return Categorical(probs=votes + LEAST, validate_args=False)

    def held_out(self, z: Tensor, y: Tensor, folds: Tensor, *x: Tensor) -> Tensor:
        """Probabilities of labelled rows when their fold is held out, (R, L, C), for folds (R, L): R ways to hold rows out.

        The setting and calibration are those that all labels choose, without the prior.
        """
        graphs, (setting, exponent, _) = self._chosen(z - z.mean(0), y, *x)
        known = torch.nonzero(y != ssl_ae.UNLABELED)[:, 0]
        every = folds.to(y.device)
        how = (self.shapes.classes, setting.alpha, self.config.sharpen, self._weigh)
        parts = [without_fold(graphs, y, known, fold, *how) for fold in every]
        return torch.stack([calibrated(p, exponent) for p in parts])

    def graphs(self, z: Tensor, setting: Setting, *x: Tensor) -> Graphs:
        """Of centred latents z (N, K), and of samples x (N, D) where the head reads all of them."""
        graph = graph_of(z, setting.metric, setting.k, self.config.power, self.reach())
        return Graphs(graph, graph)

    def reach(self) -> int:
        """Neighbours that some setting asks for."""
        return max(NEIGHBOURS) if self.config.k == "auto" else self.config.k

    def _chosen(self, z: Tensor, y: Tensor, *x: Tensor) -> tuple[Graphs, Choice]:
        """What the labels choose for centred latents (N, K), and its graphs."""

        @lru_cache(maxsize=1)  # asked for again once it is chosen
        def graphs(setting: Setting) -> Graphs:
            return self.graphs(z, setting, *x)

        settings = settings_of(self.config, int((y != ssl_ae.UNLABELED).sum()))
        choice = chosen(graphs, y, self.shapes.classes, settings, self.config.sharpen, self._weigh)
        return graphs(choice.setting), choice

    def _weigh(self, counts: Tensor) -> Tensor:
        return CLASS_MASSES[self.config.class_mass](counts)

    def _prior(self, labels: Tensor) -> Tensor:
        """(C,), summing to 1 over the classes that have labels: no other has any mass to scale."""
        prior = self.config.prior
        wanted = (
            labels.new_tensor(prior) if isinstance(prior, tuple) else labels if prior == "labels" else torch.ones_like(labels)
        )
        wanted = wanted * (labels > 0)
        return wanted / wanted.sum()

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        classes = recipe.shapes.classes
        if isinstance(config.prior, tuple) and len(config.prior) != classes:
            return [f"model.head.prior has {len(config.prior)} numbers: expected {classes}, one a class."]
        return []


def alike(counts: Tensor) -> Tensor:
    """What a label of each class weighs where classes with so many labels (C,) weigh the same, (C,): 1 on average over labels."""
    there = counts > 0
    return torch.where(there, counts.sum() / (there.sum() * counts.clamp(min=1)), 0.0)


CLASS_MASSES: dict[str, Weigh] = {"labels": torch.ones_like, "equal": alike}


def spread(graph: Tensor, labels: Tensor, alpha: float, steps: int = MOST_STEPS) -> Tensor:
    """F of S (N, N) and Y (N, c), (N, c) >= 0.

    By steps, not by solving (I - alpha S) F = (1 - alpha) Y: what is far from every label is tiny, and as all its terms are
    positive its proportions are right where a solver would leave them to rounding.
    """
    found = labels
    for step in range(1, steps + 1):
        before, found = found, torch.add((1 - alpha) * labels, graph @ found, alpha=alpha)
        if step % LOOK == 0 and alpha * (shares_of(found) - shares_of(before)).abs().max() < STILL * (1 - alpha):
            break
    return found


def shares_of(mass: Tensor) -> Tensor:
    return mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def probabilities(mass: Tensor, otherwise: Tensor) -> Tensor:
    """Rows of F (N, C) divided by their sums; `otherwise` (C,) where no label has come."""
    return torch.where(mass.sum(1, keepdim=True) > 0, shares_of(mass), otherwise)


def sharpened(graph: Tensor, labels: Tensor, mass: Tensor, rounds: int, power: float = SHARPNESS) -> Tensor:
    """F (N, C) after rounds of diffusion over S (N, N) and p^power, then of diffusion alone, so that borders stay unsure.

    Rows that no label Y (N, C) has come to stay 0.
    """
    if not rounds:
        return mass
    known, p = labels.sum(1) > 0, shares_of(mass)
    for number in range(rounds + 1):
        for _ in range(DIFFUSION):
            p = graph @ p
            p[known] = labels[known]
        p = shares_of(p)
        if number < rounds:
            p = calibrated(p, power)
    return p


def calibrated(p: Tensor, exponent: float) -> Tensor:
    """p^exponent, each row divided by its sum, (N, C)."""
    return shares_of(p**exponent)


def balanced(p: Tensor, prior: Tensor, steps: int = 100) -> Tensor:
    """p (N, C) with rows and columns scaled until its columns have the means `prior` (C,) and its rows the sum 1."""
    for _ in range(steps):
        ratio = torch.where(prior > 0, prior / p.mean(0).clamp(min=torch.finfo(p.dtype).tiny), 1.0)
        p = shares_of(p * ratio)
        if (ratio - 1).abs().max() < STILL:
            break
    return p


def settings_of(config: LabelSpreading.Config, labels: int) -> list[Setting]:
    """Those that so many labels are to compare, the safe one first."""

    def tried(value: str | float, safe: str | float, among: Sequence[str | float]) -> list[str | float]:
        return [safe, *(each for each in among if each != safe)] if value == "auto" else [value]

    many = labels >= MANY
    metrics = tried(config.metric, SAFE_METRIC, [*METRICS] if many else [])
    neighbours, alphas = tried(config.k, SAFE_K, NEIGHBOURS if many else []), tried(config.alpha, SAFE_ALPHA, ALPHAS)
    return [Setting(*each) for each in product(metrics, neighbours, alphas)]  # settings of one graph after one another


def chosen(
    graphs: Callable[[Setting], Graphs],
    y: Tensor,
    classes: int,
    settings: Sequence[Setting],
    sharpen: int = 0,
    weigh: Weigh = torch.ones_like,
) -> Choice:
    """Between settings, by cross-validation over the labels y (N,) on their graphs."""
    known = torch.nonzero(y != ssl_ae.UNLABELED)[:, 0]
    best, fold = settings[0], folds(y[known])
    judged = fold >= 0
    truth = y[known][judged]
    if len(truth.unique()) < 2:
        return Choice(best, 1.0)

    def tried(each: Setting, sharpen: int = 0) -> tuple[Tensor, float]:
        p = without_fold(graphs(each), y, known, fold, classes, each.alpha, sharpen, weigh)
        return likeliest(p[judged], truth)

    found = {each: tried(each) for each in settings} if len(settings) > 1 else {}
    if found:
        likely = min(found, key=lambda each: float(found[each][0].mean()))
        better = found[best][0] - found[likely][0]
        if float(better.mean()) > float(better.std() / len(better) ** 0.5):
            best = likely
    exponent = (tried(best, sharpen) if sharpen or not found else found[best])[1]
    return Choice(best, exponent, {each: float(losses.mean()) for each, (losses, _) in found.items()})


def told(name: str, config: LabelSpreading.Config, choice: Choice, labels: int) -> ssl_ae.Findings | None:
    """What became of the options that are `auto`; None where none is."""
    values = choice.setting._asdict()
    free = [option for option in values if getattr(config, option) == "auto"]
    if not free:
        return None
    taken = ", ".join(f"{option} {values[option]}" for option in free)
    waiting = [option for option in free if option != "alpha"] if labels < MANY else []
    if not choice.losses:
        few = f"too few of the {labels:,} labels can be held out"
        reason = f"it chooses {' and '.join(waiting)} from {MANY} labels on" if waiting == free else few
        return ssl_ae.Findings(said=(f"head {name} keeps {taken}: {reason}.",))
    losses = list(choice.losses.values())
    of_taken = choice.losses[choice.setting]
    text = f"head {name} took {taken} by the log-loss of {labels:,} labels, held out in turn: {of_taken:.3f}"
    text += f", by the safe setting {losses[0]:.3f}." if of_taken != losses[0] else ", the safe setting."
    if waiting:
        text += f" From {MANY} labels on it chooses {' and '.join(waiting)}, too."
    numbers = {f"head/{option}": float(values[option]) for option in free if option != "metric"}
    return ssl_ae.Findings(said=(text,), metrics={"head/nll": of_taken, **numbers})


def folds(y: Tensor) -> Tensor:
    """Which fold each labelled row is held out in, (L,): the classes spread evenly; -1 in classes too small for every fold."""
    from sklearn.model_selection import StratifiedKFold

    fold = torch.full_like(y, -1)
    enough = torch.nonzero(torch.bincount(y)[y] >= FOLDS)[:, 0]
    if len(enough):
        parts = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(enough)), y[enough].cpu().numpy())
        for number, (_, held) in enumerate(parts):
            fold[enough[torch.from_numpy(held).to(y.device)]] = number
    return fold


def likeliest(p: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """-log p of labels y (L,) under p (L, C) raised to the exponent that makes them likeliest, (L,); and that exponent."""
    losses = torch.stack([-shares_of(calibrated(p, e) + LEAST).gather(1, y[:, None])[:, 0].log() for e in EXPONENTS.tolist()])
    best = int(losses.mean(1).argmin())
    return losses[best], float(EXPONENTS[best])


def without_fold(
    graphs: Graphs,
    y: Tensor,
    known: Tensor,
    fold: Tensor,
    classes: int,
    alpha: float,
    sharpen: int = 0,
    weigh: Weigh = torch.ones_like,
) -> Tensor:
    """Probabilities of the labelled rows `known` (L,) when their fold (L,) is held out, (L, C), before calibration.

    Rows of fold -1 never are, and have no answer: 1 / C. Spreading is linear in the labels: each fold spreads by itself, and
    what a fold is predicted by is the sum of the others. Sharpening is not: it is done fold by fold.
    """
    count = int(fold.max()) + 1
    part = torch.where(fold < 0, count, fold)
    parts = int(part.max()) + 1
    labels = torch.zeros(len(y), parts, classes, device=y.device)
    labels[known, part, y[known]] = 1
    steps = TRIAL_STEPS if sharpen else MOST_STEPS
    mass = spread(graphs.wide, labels.flatten(1), alpha, steps).unflatten(1, (parts, classes))  # (N, parts, C)
    found = torch.ones(len(known), classes, device=y.device)
    for number in range(count):
        others, held = torch.arange(parts) != number, fold == number
        left = labels[:, others].sum(1)
        every = sharpened(graphs.narrow, left, mass[:, others].sum(1) * weigh(left.sum(0)), sharpen)
        found[held] = every[known[held]]
    counts = torch.bincount(y[known], minlength=classes).float()
    return probabilities(found, counts * weigh(counts) / counts.sum())
