"""Do no harm: the head that takes what the labels alone speak for, and the plain model of the samples where they say nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

import ssl_ae
from ssl_ae_builtins.forests import Forest
from ssl_ae_builtins.heads import Softmax
from ssl_ae_builtins.label_spreading import LEAST, LabelSpreading
from ssl_ae_builtins.selection import Choice, choose, stratified, too_few
from ssl_ae_builtins.table_heads import Logistic

MOST = 2000  # labels that choose: more would take minutes, and tell little more
ENOUGH = 300  # held-out predictions of each candidate: of more labels than half of it, each is held out once

READS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "samples": lambda z, x: x,
    "latents": lambda z, x: z,
    "both": lambda z, x: torch.cat([z, x], 1),
}


class Auto(ssl_ae.TableHead):
    """Of classifiers on samples, latents and both, the simplest that held-out labels do not speak against (Stone 1974).

    The labels are parted into `folds` that show the classes alike, and each is held out in turn; a forest is judged by those
    of its trees that have not seen a label; what label spreading chooses by cross-validation, all labels chose. From simple
    to complex, a candidate is taken where its Brier score on held-out labels (|p - y|^2, Brier 1950: proper as the log-loss
    is, and no row can decide it alone) is better than that of the one taken before by more than the standard error of their
    difference. Labels too few to choose by choose nothing: logistic regression on the samples it is. Classes count as often
    as the labels show them. Of more than 2,000 labels, 2,000 choose.
    """

    name = "auto"
    reads_samples = True
    fits_on = LabelSpreading.fits_on

    class Config(ssl_ae.Config):
        folds: int = Field(5, ge=2, description="parts of the labels, each held out in turn")
        repeats: int = Field(3, ge=1, description=f"ways to part them; fewer where labels times ways exceed {ENOUGH}")
        trees: int = Field(100, ge=1, description="of each random forest")
        network: bool | Literal["auto"] = Field(
            "auto", description="also try the network finetuned end to end; auto: where labels can train the encoder"
        )
        network_steps: int = Field(
            500,
            ge=1,
            description="of labelled rows, of each training of that network: one a fold, and one more where it is taken",
        )

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.candidates = self._fresh()

    def _fresh(self) -> nn.ModuleDict:
        return nn.ModuleDict({each.name: each.build(self.config, self.shapes) for each in CANDIDATES})

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        if config.network is not True or recipe.encoder.cls.differentiable:
            return []
        return [
            f"model.head.network = true: the code of encoder {recipe.encoder.full_name} is a constant of each step, so labels "
            "cannot train it. Leave it out, or set model.head.network: false."
        ]

    def rival(self) -> Softmax | None:
        """A linear softmax, which the latents of the network's own encoder leave to this head to keep."""
        return Softmax(Softmax.Config(), self.shapes) if self.config.network else None

    def fit(self, z: Tensor, y: Tensor, x: Tensor, network: ssl_ae.Network | None = None) -> None:
        """z (N, K), y (N,) with UNLABELED = -1, x (L, D) of the labelled rows; only the candidate that is taken is kept."""
        y, x = y.cpu(), x.cpu()  # where scikit-learn is
        labels = y[y != ssl_ae.UNLABELED]
        self.candidates = self._fresh()  # what an earlier fit kept
        choice = too_few(labels, NAMES[0]) or self._choose(z, y, x, labels, network)
        taken, place = self.candidates[choice.taken], NAMES.index(choice.taken)
        if choice.taken == NETWORK:
            linear = network.take(y, self.config.network_steps).affine()
            taken.keep("weight", linear.weight.cpu())
            taken.keep("bias", linear.bias.cpu())
        else:
            taken.fit(*CANDIDATES[place].table(taken, z, y, x))
        self.keep("taken", torch.tensor(place))
        self.found = choice.findings({each.name for each in CANDIDATES if each.reads != "samples"})

    def _choose(self, z: Tensor, y: Tensor, x: Tensor, labels: Tensor, network: ssl_ae.Network | None) -> Choice:
        if len(labels) > MOST:
            some = stratified(labels, -(-len(labels) // MOST), 1)[0] == 0
            y, x, labels = sparing(y, some), x[some], labels[some]
        folds = stratified(labels, self.config.folds, max(1, min(self.config.repeats, ENOUGH // len(labels))))
        scratch = self._fresh()
        fitted = [each for each in CANDIDATES if each.name != NETWORK]
        tables = {each.name: each.table(scratch[each.name], z, y, x) for each in fitted}
        held_out = {each.name: each.held_out(scratch[each.name], *tables[each.name], folds).cpu() for each in fitted}
        if network is not None:  # in one way: a training each fold is slow enough
            held_out[NETWORK] = network.held_out(y, folds[:1], self.config.network_steps).expand(len(folds), -1, -1)
        return choose({name: (p + LEAST) / (1 + p.shape[2] * LEAST) for name, p in held_out.items()}, labels)

    def predict(self, z: Tensor, x: Tensor) -> Distribution:
        """(B, K), (B, D) -> Categorical, (B,)."""
        taken = CANDIDATES[int(self.taken)]
        p = self.candidates[taken.name].predict(READS[taken.reads](z, x)).probs
        return Categorical(probs=p + LEAST, validate_args=False)


def sparing(y: Tensor, some: Tensor) -> Tensor:
    """y (N,) with the labels of `some` (L,) bool of the labelled rows alone."""
    y = y.clone()
    y[torch.nonzero(y != ssl_ae.UNLABELED)[~some, 0]] = ssl_ae.UNLABELED
    return y


def refitted(head: ssl_ae.TableHead, z: Tensor, y: Tensor, folds: Tensor) -> Tensor:
    """Probabilities of labelled rows when their fold is held out, (R, L, C), by a fit to the other folds of (R, L)."""
    known = y != ssl_ae.UNLABELED
    z, y = z[known], y[known]
    p = torch.empty(*folds.shape, head.shapes.classes)
    for repeat, fold in enumerate(folds):
        for number in fold.unique():
            held = fold == number
            head.fit(z[~held], y[~held])
            p[repeat, held] = head.predict(z[held]).probs.to(p)
    return p


@dataclass(frozen=True)
class Candidate:
    """A classifier and what it reads."""

    model: str
    reads: str
    build: Callable[[Auto.Config, ssl_ae.Shapes], ssl_ae.TableHead]
    held_out: Callable[[ssl_ae.TableHead, Tensor, Tensor, Tensor], Tensor] = refitted

    @property
    def name(self) -> str:
        return f"{self.model}-{self.reads}"

    def table(self, head: ssl_ae.TableHead, z: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What it is fitted on, where its head takes it: of latents every row, of samples the labelled ones."""
        rows = torch.full_like(y, True, dtype=torch.bool) if self.reads == "latents" else y != ssl_ae.UNLABELED
        place = head.place(z.device)
        return READS[self.reads](z[rows].to(place), x.to(place)), y[rows].to(place)


def logistic(config: Auto.Config, shapes: ssl_ae.Shapes) -> Logistic:
    return Logistic(Logistic.Config(), shapes)


def forest(config: Auto.Config, shapes: ssl_ae.Shapes) -> Forest:
    return Forest(Forest.Config(trees=config.trees), shapes)


def spreading(config: Auto.Config, shapes: ssl_ae.Shapes) -> LabelSpreading:
    return LabelSpreading(LabelSpreading.Config(), shapes)


# simple ones first: what needs no network, what reads its latents, what reads more, what asks the unlabelled rows too
CANDIDATES = (
    *(
        candidate
        for reads in READS
        for candidate in (Candidate("logistic", reads, logistic), Candidate("forest", reads, forest, Forest.held_out))
    ),
    Candidate("label_spreading", "latents", spreading, LabelSpreading.held_out),
    Candidate("network", "latents", logistic),  # W and b on the latents of an encoder that learned from labels too
)
NETWORK = CANDIDATES[-1].name
NAMES = tuple(each.name for each in CANDIDATES)
