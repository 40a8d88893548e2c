"""Semantic hashing: codes of bits, or of symbols with a few values, so that alike samples lie a few bits apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import PosteriorKind, straight_through
from ssl_ae_builtins.activations import Activation
from ssl_ae_builtins.mlp import (
    AUTO_DEPTH,
    Depth,
    Layers,
    WidthsOrAuto,
    complaints_about_depth,
    count_hidden,
    hidden_sizes,
)


class HashEncoder(ssl_ae.Encoder):
    """z = [s > 0] with logits s = W h + b, learnt as sigmoid(s + sigma eps) (Salakhutdinov & Hinton 2009, semantic hashing).

    sampling: noise    eps ~ N(0, I) is drawn at every training step (the paper keeps one draw a sample, for conjugate
                       gradients), and sigma grows from 0 to `noise` over `anneal_steps`: what the decoder is told survives
                       only in units whose logits are large, so units become 0 or 1. Wherever nothing is disturbed (evaluation,
                       extraction) the code is exactly 0s and 1s by threshold; gradients pass through it as through sigmoid(s).
    sampling: gumbel   q(z|x) is Bernoulli, P(z_k = 1) = sigmoid(s_k), and bits are drawn; features are the probabilities. With
                       `levels: L` the code is K / L multinoulli symbols, one-hot in L numbers each, P = softmax(s). The
                       gradient is straight-through Gumbel and therefore biased (Jang et al. 2017, sec. 2.2; Maddison et al.
                       2017): it is taken at the symbols, but moves the relaxed ones. With `kl` l_X becomes a bound on -log p(x)
                       under a uniform prior.

    `ssl-ae search` compares these codes by Hamming distance.
    """

    name = "hash"
    noisy = True

    class Config(ssl_ae.Config):
        widths: WidthsOrAuto = Field(
            (512, 256), description="sizes of the hidden layers, [] for none; auto: a geometric row from the sample to the code"
        )
        depth: Depth | None = Field(None, description=f"hidden layers of widths: auto; default {AUTO_DEPTH}")
        activation: Activation = Field("relu", description="of the hidden layers")
        batch_norm: bool = Field(False, description="normalise each hidden layer before its activation (Ioffe & Szegedy 2015)")
        sampling: Literal["noise", "gumbel"] = Field("noise", description="what makes codes discrete: growing noise, or draws")
        noise: float = Field(4.0, ge=0, description="standard deviation at the logits that sampling: noise ends with")
        anneal_steps: int = Field(2000, ge=0, description="steps in which that noise grows from 0; 0: at once")
        temperature: float = Field(
            1.0, gt=0, description="of sampling: gumbel: lower is less biased, with gradients that vary more"
        )
        levels: int | None = Field(None, ge=2, description="values of a symbol, with sampling: gumbel; default: bits")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        inputs = math.prod(shapes.x)
        sizes = [inputs, *hidden_sizes(config.widths, config.depth, inputs, shapes.latent)]
        self.layers = Layers(sizes, config.activation, config.batch_norm, "h")
        self.linear = nn.Linear(sizes[-1], shapes.latent)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), (B, K). Disturbed only where `run.step` is given."""
        logits = run.tap(self.linear(self.layers(x.flatten(1), run)), "logits")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.levels:
            return ssl_ae.CategoricalCode(logits.unflatten(1, (-1, self.config.levels)), self.config.temperature)
        if self.config.sampling == "gumbel":
            return ssl_ae.BernoulliCode(logits, self.config.temperature)
        if run.step is None:
            return ssl_ae.Point(straight_through((logits > 0).to(logits.dtype), logits.sigmoid()))
        return ssl_ae.Point((logits + self.sigma(run.step) * torch.randn_like(logits)).sigmoid())

    def sigma(self, step: Tensor) -> Tensor:
        """() standard deviation of the noise at a step: noise * min(1, (step + 1) / anneal_steps)."""
        return self.config.noise * ((step + 1) / max(1, self.config.anneal_steps)).clamp(max=1.0)

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Histogram]:
        logits = trace.taps["logits"].float()
        levels = self.config.levels
        values = logits.unflatten(1, (-1, levels)).softmax(-1) if levels else logits.sigmoid()
        title = "Units of the code before they are made 0 or 1: those in between lose what they say"
        yield ssl_ae.Histogram("code_units", title, values.flatten(), "sigmoid or softmax of the logits, in [0, 1]")

    @classmethod
    def posterior(cls, config: Config) -> PosteriorKind:
        return "categorical" if config.levels else "bernoulli" if config.sampling == "gumbel" else "point"

    @classmethod
    def symbol(cls, config: Config) -> int:
        return config.levels or 1

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        hidden = config.activation == "sigmoid" and count_hidden(config.widths, config.depth)
        return (*(["h*"] if hidden else []), "code")

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        complaints, place = complaints_about_depth("model.encoder", config), "model.encoder"
        unused = ("noise", "anneal_steps") if config.sampling == "gumbel" else ("temperature",)
        other = "noise" if config.sampling == "gumbel" else "gumbel"
        for option in unused:
            if getattr(config, option) != cls.Config.model_fields[option].default:
                complaints.append(
                    f"{place}.{option} = {getattr(config, option):g}: has no effect with sampling: {config.sampling}. "
                    f"Remove it, or set {place}.sampling: {other}."
                )
        if config.levels and config.sampling != "gumbel":
            complaints.append(
                f"{place}.levels = {config.levels}: noise makes bits, symbols of {config.levels} values are drawn. "
                f"Set {place}.sampling: gumbel, or remove levels."
            )
        elif config.levels and recipe.shapes.latent % config.levels:
            complaints.append(
                f"{place}.levels = {config.levels}: does not divide model.latent_dim = {recipe.shapes.latent}. "
                f"Make latent_dim a multiple of it: {config.levels} numbers for each symbol."
            )
        return complaints
