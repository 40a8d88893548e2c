"""The label as a part of what generates x: p(y) p(z) p(x|z, y), with q(y|x) q(z|x, y) for what is unknown of a row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae_builtins.activations import Activation
from ssl_ae_builtins.mlp import Layers, MlpDecoder, Widths, filters


def complaints_about_classes(place: str, recipe) -> list[str]:
    if recipe.shapes.classes is not None:
        return []
    return [f"{place}: reads the class of a sample, but {recipe.card.name} has no classes. Take mlp."]


class ConditionalMlpEncoder(ssl_ae.Encoder):
    """q(z|x, y) and features for q(y|x), each a multilayer perceptron (M2; Kingma et al. 2014, arXiv:1406.5298, sec. 3.1.2).

    h1 = f(W1 [x, y] + b1), ..., then q(z|h); beside it c1 = f(U1 x + a1), ..., and the features U c + a, of the code's size.
    Heads, stored latents and searches see the features, which know no label. With the head `softmax` they make q(y|x) that
    perceptron's softmax, as long as the code has no fewer dimensions than there are classes.
    """

    name = "conditional_mlp"
    conditional = True

    class Config(ssl_ae.Config):
        widths: Widths = Field((500,), description="sizes of the hidden layers of q(z|x, y)")
        classifier: tuple[Annotated[int, Field(ge=1)], ...] = Field((500,), description="sizes of the hidden layers of q(y|x)")
        activation: Activation = Field("softplus", description="of the hidden layers")
        batch_norm: bool = Field(False, description="normalise each hidden layer before its activation (Ioffe & Szegedy 2015)")
        posterior: Posterior = Field("diag", description="q(z|x, y): point, diag or full covariance")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        inputs, act, norm = math.prod(shapes.x), config.activation, config.batch_norm
        below, beside = [inputs + shapes.classes, *config.widths], [inputs, *config.classifier]
        self.layers = Layers(below, act, norm, "h")
        self.latent = ssl_ae.Latent(below[-1], shapes.latent, config.posterior)
        self.classifier = Layers(beside, act, norm, "c")
        self.features = nn.Linear(beside[-1], shapes.latent)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x, y), (B, K), under run.condition; without it Point(features), (B, K)."""
        x = x.flatten(1)
        if run.condition is None:
            return ssl_ae.Point(self.features(self.classifier(x, run)))
        return self.latent(self.layers(torch.cat([x, run.condition.to(x.dtype)], 1), run))

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        first = self.classifier.blocks[0][0].weight if self.config.classifier else self.features.weight
        yield filters(first, self.shapes.x)

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        complaints = complaints_about_classes("model.encoder.name = conditional_mlp", recipe)
        if not recipe.decoder.cls.conditional:
            complaints.append(
                "model.encoder.name = conditional_mlp: q(z|x, y) leaves the label to the decoder, but "
                f"{recipe.decoder.full_name} does not read it. Set model.decoder.name: conditional_mlp."
            )
        return complaints


class ConditionalMlpDecoder(MlpDecoder):
    """p(x|z, y): a multilayer perceptron on [z, y] (Kingma et al. 2014, arXiv:1406.5298, eq. 2); sizes mirror the encoder's."""

    name = "conditional_mlp"
    conditional = True

    def __init__(self, config: MlpDecoder.Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, replace(shapes, latent=shapes.latent + shapes.classes))
        self.shapes = shapes

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K), run.condition (B, C) -> p(x|z, y) over (B, *shapes.x); without a condition y is 1 / C everywhere."""
        classes = self.shapes.classes
        label = z.new_full((len(z), classes), 1 / classes) if run.condition is None else run.condition.to(z.dtype)
        return super().forward(torch.cat([z, label], 1), run)

    def slices(self) -> tuple[()]:
        return ()

    @classmethod
    def parts(cls, config: MlpDecoder.Config) -> int:
        return 1

    @classmethod
    def check(cls, config: MlpDecoder.Config, recipe) -> list[str]:
        return [*super().check(config, recipe), *complaints_about_classes("model.decoder.name = conditional_mlp", recipe)]


class LabelKl(ssl_ae.Regularizer):
    """KL(q(y|x) || p(y)) = log C - H(q(y|x)) per row in nats, p(y) uniform (Kingma et al. 2014, arXiv:1406.5298, eq. 6 and 7).

    Of a labelled row -log p(y) = log C. With `kl`, both of weight 1, l_X and penalties are the negative bound: of log p(x, y) on
    labelled rows, of log p(x) on the others. Weight 1 as alpha multiplies it with l_X: the paper's l_Y has the factor alpha times
    the rows, on the sum over the rows, so ours is l_Y + (1 / theirs) l_X, of means: its 0.1 is alpha: 10.
    """

    name = "label_kl"
    needs = frozenset({ssl_ae.Need.LABEL_SUM})

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,). Without a head q(y|x) is p(y)."""
        rows, most = len(trace.batch), math.log(trace.model.encoder.shapes.classes)
        entropy = trace.batch.x.new_full((rows,), most) if trace.p_y is None else trace.p_y.entropy()
        return torch.where(trace.batch.labeled, most, most - entropy)

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        if recipe.encoder.cls.conditional or recipe.decoder.cls.conditional:
            return []
        return [
            f"label_kl: no label enters encoder {recipe.encoder.full_name} or decoder {recipe.decoder.full_name}. "
            "Set both to conditional_mlp, or remove label_kl."
        ]
