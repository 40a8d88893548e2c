"""Encoders and decoders with an inside: slices, layers in [0, 1], a closed form of the Jacobian, statistics of their own."""

import math

from torch import nn

import ssl_ae
from ssl_ae.registry import Entry, Plugin
from ssl_ae.resolve import Part
from ssl_ae.testing.companions import PlainEncoder

WIDTH = 7


class Layer(ssl_ae.Encoder):
    """h = sigmoid(W x + b)."""

    name = "layer"

    def __init__(self, shapes):
        super().__init__(self.Config(), shapes)
        self.linear = nn.Linear(math.prod(shapes.x), shapes.latent)

    def forward(self, x, run):
        return ssl_ae.Point(self.linear(x.flatten(1)).sigmoid())


class Stacked(ssl_ae.Encoder):
    """h1 = sigmoid(W1 x + b1), z = sigmoid(W2 h1 + b2), trained one by one (Vincent et al. 2010)."""

    name = "stacked"

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.first = Layer(ssl_ae.Shapes(shapes.x, WIDTH))
        self.second = Layer(ssl_ae.Shapes((WIDTH,), shapes.latent))

    def forward(self, x, run):
        return self.second(run.tap(self.first(x, run).mean, "h1"), run)

    def slices(self):
        return self.first, self.second

    def squared_jacobian(self, layers):
        h, z = layers["h1"], layers["code"]
        first, second = self.first.linear.weight, self.second.linear.weight
        slope = (z * (1 - z))[:, :, None] * second * (h * (1 - h))[:, None]  # (B, K, WIDTH)
        return (slope @ first).square().sum((1, 2))

    def pictures(self, trace):
        yield ssl_ae.Tiles("filters", "Filters", self.first.linear.weight.unflatten(1, self.shapes.x))

    @classmethod
    def parts(cls, config):
        return 2

    @classmethod
    def unit_interval(cls, config):
        return ("h*", "code")


class DecoderLayer(ssl_ae.Decoder):
    """N(W z + b, I)."""

    name = "layer"

    def __init__(self, shapes):
        super().__init__(self.Config(), shapes)
        self.linear = nn.Linear(shapes.latent, math.prod(shapes.x))
        self.output = ssl_ae.Likelihood("gaussian", shapes.x)

    def forward(self, z, run):
        return self.output(self.linear(z).unflatten(1, (1, *self.shapes.x))), {}


class StackedDecoder(ssl_ae.Decoder):
    """Two linear layers, the mirror of `Stacked` (Vincent et al. 2010)."""

    name = "stacked"

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.first = DecoderLayer(ssl_ae.Shapes((WIDTH,), shapes.latent))
        self.second = DecoderLayer(ssl_ae.Shapes(shapes.x, WIDTH))

    def forward(self, z, run):
        return self.second(self.first(z, run)[0].mean, run)

    def slices(self):
        return self.first, self.second

    @classmethod
    def parts(cls, config):
        return 2


class Normalises(PlainEncoder):
    """h1 = norm(W x + b): with statistics of its own (Ioffe & Szegedy 2015)."""

    name = "normalises"
    moments_class = ssl_ae.BatchMoments

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.moments = self.moments_class(self.linear.out_features)

    def forward(self, x, run):
        return self.latent(run.norm(self.linear(x.flatten(1)), "h1", self.moments))


def own(kind, cls, **options) -> Part:
    """A component that no plugin owns, as a resolved recipe has it."""
    return Part(Entry(kind, cls, Plugin("kit", "kit", "1")), cls.Config(**options))
