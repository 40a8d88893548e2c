"""Regularizers and table heads, each with one fault."""

from dataclasses import replace

import torch
from broken import breaks
from torch.distributions import Categorical

import ssl_ae

# -- regularizers ---------------------------------------------------------------------------------------------------------


class Penalty(ssl_ae.Regularizer):
    """What each broken penalty changes."""

    name = "broken"

    def penalty(self, trace):
        return self.value(trace.z)


@breaks("penalty", "19 rows gave shape \\(\\), expected \\(19,\\)")
class Averages(Penalty):
    def value(self, z):
        return z.square().mean()


@breaks("penalty_row_law", "depends on the other rows")
class AgainstMean(Penalty):
    def value(self, z):
        return (z - z.mean(0)).square().sum(1)


@breaks("penalty_gradient", "no gradient")
class NoGradient(Penalty):
    def value(self, z):
        return z.detach().square().sum(1)


@breaks("penalty_gradient", "is not finite")
class RootAtZero(Penalty):
    def value(self, z):
        return (z * 0.0).square().sum(1).sqrt()


@breaks("perturb", "changed layer 'input' in place")
class InPlace(ssl_ae.Regularizer):
    """Noise."""

    name = "broken"

    def perturb(self, h, layer):
        return h.add_(1.0)


@breaks("perturb", "torch.bfloat16, became .* torch.float32")
class Promotes(ssl_ae.Regularizer):
    """Noise."""

    name = "broken"

    def perturb(self, h, layer):
        return h + torch.randn(h.shape)


@breaks("evaluation", "two evaluations of the same rows differ")
class AlwaysNoisy(ssl_ae.Regularizer):
    """Noise."""

    name = "broken"
    always = True

    def perturb(self, h, layer):
        return h + torch.randn_like(h)


@breaks("transform", "one generator state gave two results")
class OwnDice(ssl_ae.Regularizer):
    """Noise."""

    name = "broken"

    def transform(self, batch, generator):
        return replace(batch, x=batch.x + torch.randn_like(batch.x))


@breaks("transform", "x \\(19, 3, 7, 5\\) became \\(9, 3, 7, 5\\)")
class DropsRows(ssl_ae.Regularizer):
    """Fewer rows."""

    name = "broken"

    def transform(self, batch, generator):
        return ssl_ae.Batch(x=batch.x[: len(batch) // 2])


@breaks("transform", "it changed y, which says who the rows are")
class Relabels(ssl_ae.Regularizer):
    """Other labels."""

    name = "broken"

    def transform(self, batch, generator):
        return replace(batch, y=batch.y.flip(0))


@breaks("project", "a second call changed encoder.linear.weight")
class Shrinks(ssl_ae.Regularizer):
    """Smaller weights."""

    name = "broken"

    def project(self, model):
        model.encoder.linear.weight.mul_(0.9)


# -- table heads ----------------------------------------------------------------------------------------------------------


class Means(ssl_ae.TableHead):
    """The nearest class mean: what each broken table head changes."""

    name = "broken"

    def fit(self, z, y):
        known = y != ssl_ae.UNLABELED
        self.keep("means", self.means_of(z[known], y[known]))

    def means_of(self, z, y):
        return torch.stack([z[y == c].mean(0) for c in range(self.shapes.classes)])

    def predict(self, z):
        return Categorical(logits=-torch.cdist(z, self.means), validate_args=False)


@breaks("unlabeled", "60 of 60 unlabelled rows nearest to class 0")
class MinusOneIsLast(Means):
    def fit(self, z, y):
        self.keep("means", self.means_of(z, y % self.shapes.classes))  # -1 % C is the last class


@breaks("learns", "101 of 101 rows were given another class")
class OffByOne(Means):
    def means_of(self, z, y):
        return super().means_of(z, y).roll(1, 0)


@breaks("stored", "has no attribute 'means'")
class InAttributes(Means):
    def keep(self, name, value):
        object.__setattr__(self, name, value)
