"""Fully connected encoder and decoder; the decoder mirrors the encoder unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae.likelihood import Likelihood
from ssl_ae_builtins import jacobians
from ssl_ae_builtins.activations import Activation, activation
from ssl_ae_builtins.outputs import OutputConfig, OutputDecoder

AUTO_DEPTH = 2  # hidden layers of `widths: auto` unless `depth` says otherwise


def _form(given: Any) -> str | None:
    """Only the form that was meant complains."""
    return "<text>" if given == "auto" else "<section>" if isinstance(given, (list, tuple)) else None


Widths = tuple[Annotated[int, Field(ge=1)], ...]
Auto = Literal["auto"]
WidthsOrAuto = Annotated[
    Annotated[Widths, Tag("<section>")] | Annotated[Auto, Tag("<text>")],
    Discriminator(_form, "either", "expected a list of sizes, or auto"),
]
Depth = Annotated[int, Field(ge=1)]


def hidden_sizes(widths: Widths | Auto, depth: int | None, inputs: int, latent: int) -> Widths:
    """Sizes of the hidden layers from `inputs` D to `latent` K: the widths themselves, or a gradual bottleneck.

    auto: layer l of depth L has D (K / D)^(l / (L + 1)) units, rounded: every layer shrinks (or grows) by one factor.
    """
    if widths != "auto":
        return widths
    depth = depth or AUTO_DEPTH
    return tuple(max(1, round(inputs * (latent / inputs) ** (layer / (depth + 1)))) for layer in range(1, depth + 1))


def count_hidden(widths: Widths | Auto | None, depth: int | None) -> int:
    """How many hidden layers these options give."""
    return (depth or AUTO_DEPTH) if widths == "auto" else len(widths or ())


def complaints_about_depth(place: str, config: ssl_ae.Config) -> list[str]:
    """Both encoder and decoder count layers by `depth` only where they choose the sizes themselves."""
    if config.depth is None or config.widths == "auto":
        return []
    widths = "the encoder's" if config.widths is None else list(config.widths)
    return [f"{place}.depth = {config.depth}: has no effect with widths = {widths}. Set {place}.widths: auto, or remove depth."]


def filters(weight: Tensor, shape: tuple[int, ...]) -> ssl_ae.Tiles:
    """The rows of a first layer (n, D) as the samples (n, *shape) that excite its units most."""
    return ssl_ae.Tiles("filters", "Filters of the first layer: the weights into each unit", weight.unflatten(1, shape))


class Layers(nn.Module):
    """linear -> (batch-norm) -> activation, each tapped as PREFIX1, PREFIX2, ..."""

    def __init__(self, sizes: Sequence[int], act: Activation, batch_norm: bool, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b, bias=not batch_norm), *([nn.BatchNorm1d(b)] if batch_norm else []), activation(act))
            for a, b in pairwise(sizes)
        )

    def forward(self, h: Tensor, run: ssl_ae.Pass) -> Tensor:
        """(B, sizes[0]) -> (B, sizes[-1])."""
        for i, block in enumerate(self.blocks, start=1):
            h = run.tap(block(h), f"{self.prefix}{i}")
        return h


class MlpEncoder(ssl_ae.Encoder):
    """Multilayer perceptron: h1 = f(W1 x + b1), ..., then q(z|h) (Hinton & Salakhutdinov 2006)."""

    name = "mlp"

    class Config(ssl_ae.Config):
        widths: WidthsOrAuto = Field(
            (512, 256),
            description="sizes of the hidden layers, [] for none; auto: a geometric row from the sample to the code",
        )
        depth: Depth | None = Field(None, description=f"hidden layers of widths: auto; default {AUTO_DEPTH}")
        activation: Activation = Field("relu", description="of the hidden layers")
        code_activation: Activation = Field("identity", description="of the code, f(W h + b); with posterior point only")
        batch_norm: bool = Field(False, description="normalise each hidden layer before its activation (Ioffe & Szegedy 2015)")
        posterior: Posterior = Field("point", description="q(z|x): point, diag or full covariance")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        inputs = math.prod(shapes.x)
        sizes = [inputs, *hidden_sizes(config.widths, config.depth, inputs, shapes.latent)]
        self.layers = Layers(sizes, config.activation, config.batch_norm, "h")
        self.latent = ssl_ae.Latent(sizes[-1], shapes.latent, config.posterior)
        self.code_activation = activation(config.code_activation)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), (B, K)."""
        q = self.latent(self.layers(x.flatten(1), run))
        return q if self.config.code_activation == "identity" else ssl_ae.Point(self.code_activation(q.mean))

    def squared_jacobian(self, layers: Mapping[str, Tensor]) -> Tensor | None:
        """Closed for at most one hidden layer without batch normalisation, (B,)."""
        blocks = self.layers.blocks
        if self.config.batch_norm and len(blocks):
            return None
        hidden = [(block[0].weight, self.config.activation, layers[f"h{i}"]) for i, block in enumerate(blocks, start=1)]
        code = (self.latent.mean_weight, self.config.code_activation, layers["code"])
        return jacobians.of_chain([*hidden, code])

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        first = self.layers.blocks[0][0].weight if len(self.layers.blocks) else self.latent.mean_weight
        yield filters(first, self.shapes.x)

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        hidden = config.activation == "sigmoid" and count_hidden(config.widths, config.depth)
        return (*(["h*"] if hidden else []), *(["code"] if config.code_activation == "sigmoid" else []))

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        complaints = complaints_about_depth("model.encoder", config)
        if config.code_activation != "identity" and config.posterior != "point":
            complaints.append(
                f"model.encoder.code_activation = {config.code_activation}: a code drawn from a {config.posterior} posterior "
                "has no activation. Set posterior: point, or remove code_activation."
            )
        return complaints


class MlpDecoder(OutputDecoder):
    """Multilayer perceptron d1 = f(V1 z + c1), ..., then p(x|d) (Hinton & Salakhutdinov 2006); sizes mirror the encoder's."""

    name = "mlp"

    class Config(OutputConfig):
        widths: WidthsOrAuto | None = Field(
            None, description="sizes of the hidden layers, or auto; default: the encoder's, mirrored"
        )
        depth: Depth | None = Field(None, description=f"hidden layers of widths: auto; default: the encoder's, else {AUTO_DEPTH}")
        activation: Activation | None = Field(None, description="of the hidden layers; default: the encoder's, else relu")
        batch_norm: bool | None = Field(None, description="normalise each hidden layer; default: as the encoder does")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.output = config.build(shapes.x)
        # the encoder's sizes come from x to the code
        hidden = hidden_sizes(config.widths or (), config.depth, math.prod(shapes.x), shapes.latent)
        sizes = [shapes.latent, *(reversed(hidden) if config.widths == "auto" else hidden)]
        self.layers = Layers(sizes, config.activation or "relu", bool(config.batch_norm), "d")
        self.linear = nn.Linear(sizes[-1], self.output.parameters_per_value * math.prod(shapes.x))

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, *shapes.x)."""
        raw = self.linear(self.layers(z, run)).unflatten(1, (self.output.parameters_per_value, *self.shapes.x))
        return self.output(raw), {}

    def slices(self) -> Sequence[MlpSlice]:
        """Each layer as a decoder of its own: N(d, I) over the layer that it rebuilds, the last p(x|z)."""
        blocks = list(self.layers.blocks)
        if not blocks:
            return ()
        sizes = [self.shapes.latent, *(block[0].out_features for block in blocks)]
        hidden = [
            MlpSlice(block, Likelihood("gaussian", (b,)), ssl_ae.Shapes((b,), a))
            for block, (a, b) in zip(blocks, pairwise(sizes), strict=True)
        ]
        return (*hidden, MlpSlice(self.linear, self.output, ssl_ae.Shapes(self.shapes.x, sizes[-1])))

    @classmethod
    def parts(cls, config: Config) -> int:
        return 1 + count_hidden(config.widths, config.depth)

    @classmethod
    def mirrored(cls, config: Config, encoder: ssl_ae.Config) -> Config:
        theirs = encoder.model_dump()
        widths = theirs.get("widths", (512, 256))
        fallback = {"widths": widths if widths == "auto" else widths[::-1], "activation": "relu", "batch_norm": False}
        fallback |= {name: theirs[name] for name in ("activation", "batch_norm") if name in theirs}
        if widths == "auto" and config.widths in (None, "auto"):
            fallback["depth"] = theirs.get("depth")
        return config.model_copy(update={name: value for name, value in fallback.items() if getattr(config, name) is None})

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        return [*super().check(config, recipe), *complaints_about_depth("model.decoder", config)]


class MlpSlice(ssl_ae.Decoder):
    """p(x|f(V z + c)): one layer of an `MlpDecoder` with its parameters, and a likelihood over what it rebuilds."""

    name = "mlp_slice"

    def __init__(self, layer: nn.Module, output: Likelihood, shapes: ssl_ae.Shapes) -> None:
        super().__init__(self.Config(), shapes)
        self.layer, self.output = layer, output

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, b) -> p over what the layer rebuilds, (B, *shapes.x)."""
        return self.output(self.layer(z).unflatten(1, (self.output.parameters_per_value, *self.shapes.x))), {}
