"""The ladder network: an autoencoder whose decoder undoes the noise of every layer, with help from that layer itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.likelihood import Likelihood
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

WITHOUT_SCALE = frozenset({"relu", "leaky_relu", "identity"})  # f(gamma h) = gamma f(h): the next layer's weights can do it


def sizes_of(config: ssl_ae.Config, shapes: ssl_ae.Shapes) -> list[int]:
    """m_0 = D, m_1, ..., m_L = K."""
    inputs = math.prod(shapes.x)
    return [inputs, *hidden_sizes(config.widths, config.depth, inputs, shapes.latent), shapes.latent]


def mapping(inputs: int, units: int) -> nn.Linear:
    """A matrix of N(0, 1 / inputs), as in the authors' code; what follows is normalised, so it has no bias."""
    linear = nn.Linear(inputs, units, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


class LadderLayer(nn.Module):
    """z = norm(W h), tapped after it was normalised; then f(gamma (z + beta))."""

    def __init__(self, inputs: int, units: int, act: nn.Module, scaled: bool) -> None:
        super().__init__()
        self.linear, self.moments, self.act = mapping(inputs, units), ssl_ae.BatchMoments(units), act
        self.beta = nn.Parameter(torch.zeros(units))
        self.register_parameter("gamma", nn.Parameter(torch.ones(units)) if scaled else None)

    def forward(self, h: Tensor, run: ssl_ae.Pass, name: str) -> Tensor:
        """(B, inputs) -> (B, units)."""
        h = run.norm(self.linear(h), name, self.moments) + self.beta
        return self.act(h if self.gamma is None else self.gamma * h)


class LadderEncoder(ssl_ae.Encoder):
    """z_l = norm(W_l h_{l-1}), h_l = f(gamma_l (z_l + beta_l)), code = gamma_L (z_L + beta_L) (Rasmus et al. 2015, alg. 1).

    norm subtracts the batch's mean and divides by its standard deviation; z1, ..., zL are layers, so that
    `{name: gaussian_noise, layers: [input, "z*"]}` is the paper's noise. Layers of relu, leaky_relu and identity have no gamma,
    which their next layer would make superfluous. The code is what the paper hands to softmax: latent_dim = classes and head
    `{name: softmax, weights: false}` are the paper's network. Running means and standard deviations, for evaluation, follow
    the undisturbed pass.
    """

    name = "ladder"

    class Config(ssl_ae.Config):
        widths: WidthsOrAuto = Field(
            (512, 256), description="sizes of the layers below the code; auto: a geometric row from the sample to the code"
        )
        depth: Depth | None = Field(None, description=f"layers below the code of widths: auto; default {AUTO_DEPTH}")
        activation: Activation = Field("relu", description="of the layers below the code")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        *below, top = pairwise(sizes_of(config, shapes))
        scaled = config.activation not in WITHOUT_SCALE
        layers = [LadderLayer(a, b, activation(config.activation), scaled) for a, b in below]
        self.layers = nn.ModuleList([*layers, LadderLayer(*top, nn.Identity(), scaled=True)])

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point(code), (B, K)."""
        h = x.flatten(1)
        for level, layer in enumerate(self.layers[:-1], start=1):
            h = run.tap(layer(h, run, f"z{level}"), f"h{level}")
        return ssl_ae.Point(self.layers[-1](h, run, f"z{len(self.layers)}"))

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        yield filters(self.layers[0].linear.weight, self.shapes.x)

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        return ("h*",) if config.activation == "sigmoid" and count_hidden(config.widths, config.depth) else ()

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        return complaints_about_depth("model.encoder", config)


class Combinator(nn.Module):
    """g(z~, u) = (z~ - mu(u)) v(u) + mu(u): the best denoiser of a gaussian z given u (Rasmus et al. 2015, eq. 2 to 4).

    mu(u) = a1 sigmoid(a2 u + a3) + a4 u + a5 and v(u) = a6 sigmoid(a7 u + a8) + a9 u + a10, ten parameters a unit. It starts
    from 0 everywhere: a2 = a7 = 1, the others 0.
    """

    START = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)

    def __init__(self, units: int) -> None:
        super().__init__()
        # ten vectors, not a matrix: weight decay and penalties of weights are for matrices
        self.a = nn.ParameterList(nn.Parameter(torch.full((units,), start)) for start in self.START)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """z~ (B, m) as the pass saw it, u (B, m) from the layer above -> (B, m)."""
        a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = self.a
        mean = a1 * torch.sigmoid(a2 * u + a3) + a4 * u + a5
        share = a6 * torch.sigmoid(a7 * u + a8) + a9 * u + a10
        return (z - mean) * share + mean


class LadderDecoder(ssl_ae.Decoder):
    """z^_l = g(z~_l, u_l), u_l = norm(V_{l+1} z^_{l+1}), u_L = norm(h~_L); p(x|z) = N(z^_0, I) (Rasmus et al. 2015, alg. 1).

    z~_l are the encoder's layers as the same pass saw them, z~_0 the input; g is a `Combinator` for each layer. Beside p(x|z) it
    gives z^_1, ..., z^_L as its guesses of the layers. As it needs the layers of a sample, it decodes no code of its own: it
    reconstructs, but does not generate. Its norms learn their running statistics from the only pass it has, which in training
    is the disturbed one.
    """

    name = "ladder"
    reads_layers = True

    class Config(ssl_ae.Config):
        widths: WidthsOrAuto | None = Field(None, description="the encoder's; may be left out")
        depth: Depth | None = Field(None, description="the encoder's; may be left out")
        top: Literal["softmax", "code"] = Field(
            "softmax", description="h~_L: softmax of the code, where the code is the logits as in the paper, or the code itself"
        )

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        sizes = sizes_of(config if config.widths is not None else config.model_copy(update={"widths": ()}), shapes)
        self.linears = nn.ModuleList(mapping(above, below) for below, above in pairwise(sizes))
        self.moments = nn.ModuleList(ssl_ae.BatchMoments(size) for size in sizes)
        self.combinators = nn.ModuleList(Combinator(size) for size in sizes)
        self.output = Likelihood("gaussian", shapes.x)

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) and the layers in `run.taps` -> p(x|z) over (B, *shapes.x), guesses {"zL": (B, m_L), ..., "z1": (B, m_1)}."""
        guesses, top = {}, len(self.linears)
        below = z.softmax(1) if self.config.top == "softmax" else z
        for level in range(top, -1, -1):
            name = f"z{level}" if level else "input"
            mean, std = self.moments[level](below, run.learn, run.uniform)
            guess = self.combinators[level](run.taps[name].flatten(1), (below - mean) / std)
            if level:
                guesses[name] = guess
                below = self.linears[level - 1](guess)
        return self.output(guess.unflatten(1, (1, *self.shapes.x))), guesses

    @classmethod
    def mirrored(cls, config: Config, encoder: ssl_ae.Config) -> Config:
        theirs = encoder.model_dump()
        update = {name: theirs.get(name) for name in ("widths", "depth") if getattr(config, name) is None}
        return config.model_copy(update=update)

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        encoder = recipe.encoder
        if encoder.cls is not LadderEncoder:
            return [
                f"model.decoder.name = {recipe.decoder.full_name}: it reads the layers z1, z2, ... of the ladder encoder, but "
                f"the encoder is {encoder.full_name}. Set model.encoder.name: ladder, or take another decoder."
            ]
        if (config.widths, config.depth) != (encoder.config.widths, encoder.config.depth):
            return [
                "model.decoder.widths: the ladder decoder has a step for each layer of the encoder. Leave widths and depth out."
            ]
        return []


class Ladder(ssl_ae.Regularizer):
    """sum_l lambda_l / m_l |(z^_l - mean_l) / std_l - z_l|^2 per row, l = 1 ... L (Rasmus et al. 2015, alg. 1).

    z_l is the layer of an undisturbed pass, mean_l and std_l what that pass normalised it by, z^_l the decoder's guess from the
    disturbed one. Gradients flow through all of them, the undisturbed pass too, as in the authors' code. Layer 0 is l_X:
    lambda_0 / D |x - z^_0|^2 is alpha * l_X with alpha = 2 lambda_0 / D, up to the constant of the gaussian. As alpha multiplies
    penalties beside it, the paper's cost wants weight: 1 / alpha = D / (2 lambda_0).
    """

    name = "ladder"
    needs = frozenset({ssl_ae.Need.CLEAN, ssl_ae.Need.RECONSTRUCTION})

    class Config(ssl_ae.Config):
        costs: tuple[Annotated[float, Field(ge=0)], ...] = Field(
            (10.0, 0.1), min_length=1, description="lambda_1, lambda_2, ... of layers z1, z2, ...; the last holds for all above"
        )

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        total, names = 0.0, [name for name in trace.clean if name in trace.rebuilt]
        for level, name in enumerate(names):
            mean, std = trace.clean_stats[name]
            error = (trace.rebuilt[name] - mean) / std - trace.clean[name]
            total = total + self.config.costs[min(level, len(self.config.costs) - 1)] * error.square().mean(1)
        return total

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        decoder = recipe.decoder
        if decoder.cls is not LadderDecoder:
            return [
                f"ladder compares layers with what the ladder decoder makes of them, but the decoder is {decoder.full_name}. "
                "Set model.encoder.name and model.decoder.name: ladder, or remove ladder from model.regularizers."
            ]
        layers = 1 + count_hidden(decoder.config.widths, decoder.config.depth)
        if len(config.costs) > layers:
            return [
                f"ladder.costs = {list(config.costs)}: the encoder has {layers} layers, z1 to z{layers} (the code's). "
                "The cost of layer 0 is alpha. Leave out what is too many."
            ]
        return []
