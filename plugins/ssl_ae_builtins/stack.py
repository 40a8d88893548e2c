"""Deep networks built layer by layer: each layer is an autoencoder of what the layers below it give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from pydantic import Field
from torch import Tensor, nn

import ssl_ae
from ssl_ae_builtins.activations import Activation, activation
from ssl_ae_builtins.mlp import (
    AUTO_DEPTH,
    Depth,
    WidthsOrAuto,
    complaints_about_depth,
    count_hidden,
    filters,
    hidden_sizes,
)


class StackEncoder(ssl_ae.Encoder):
    """h_k = f(W_k h_{k-1} + b_k), the last one the code: trained layer by layer, then whole (Vincent et al. 2010, sec. 3.5).

    Layer k learns first, with its mirror in the decoder, to rebuild the output of the layers below, which stay as they are
    and see no noise: `pretrain.slice_epochs` passes each (0 for none, default `epochs`). Then `epochs` passes over the whole
    stack with every layer free (Bengio et al. 2007). Noise on the layer `input` disturbs what each layer learns to rebuild,
    so that the layers are denoising autoencoders. End-to-end finetuning makes a deep classifier of the stack.
    """

    name = "stack"

    class Config(ssl_ae.Config):
        widths: WidthsOrAuto = Field(
            (512, 256), description="sizes of the layers below the code; auto: a geometric row from the sample to the code"
        )
        depth: Depth | None = Field(None, description=f"layers below the code of widths: auto; default {AUTO_DEPTH}")
        activation: Activation = Field("sigmoid", description="of every layer, the code too")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        inputs = math.prod(shapes.x)
        sizes = [inputs, *hidden_sizes(config.widths, config.depth, inputs, shapes.latent), shapes.latent]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), activation(config.activation)) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point in the range of the activation, (B, K)."""
        h = x.flatten(1)
        for k, layer in enumerate(self.layers[:-1], start=1):
            h = run.tap(layer(h), f"h{k}")
        return ssl_ae.Point(self.layers[-1](h))

    def slices(self) -> Sequence[StackSlice]:
        shapes = [self.shapes.x, *((layer[0].out_features,) for layer in self.layers[:-1])]
        names = [f"h{k}" for k in range(1, len(self.layers))]
        return tuple(
            StackSlice(layer, ssl_ae.Shapes(shape, layer[0].out_features), name)
            for layer, shape, name in zip(self.layers, shapes, [*names, None], strict=True)
        )

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        yield filters(self.layers[0][0].weight, self.shapes.x)

    @classmethod
    def parts(cls, config: Config) -> int:
        return 1 + count_hidden(config.widths, config.depth)

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        return ("h*", "code") if config.activation == "sigmoid" else ()

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        complaints = complaints_about_depth("model.encoder", config)
        if config.widths == ():
            complaints.append(
                "model.encoder.widths = []: one layer is no stack. Name layers below the code, or take encoder mlp."
            )
        return complaints


class StackSlice(ssl_ae.Encoder):
    """h = f(W x + b): one layer of a `StackEncoder` with its parameters."""

    name = "stack_slice"

    def __init__(self, layer: nn.Module, shapes: ssl_ae.Shapes, tap: str | None) -> None:
        super().__init__(self.Config(), shapes)
        self.layer, self.tap = layer, tap

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point(h), (B, b)."""
        h = self.layer(x.flatten(1))
        return ssl_ae.Point(h if self.tap is None else run.tap(h, self.tap))
