"""Encoders, decoders, heads and declarations, each with one fault."""

import torch
from broken import breaks
from pydantic import Field
from torch import nn
from torch.distributions import Categorical

import ssl_ae
from ssl_ae.data.sources import Source
from ssl_ae.testing.companions import PlainDecoder, PlainEncoder, PlainHead

# -- declarations ---------------------------------------------------------------------------------------------------------


@breaks("registered", "name = 'Dense/Net': expected lower-case letters")
class IllegalName(PlainEncoder):
    """An encoder."""

    name = "Dense/Net"


@breaks("registered", "version = 0")
class IllegalVersion(PlainEncoder):
    """An encoder."""

    version = 0


@breaks("documented", "no docstring")
class Undocumented(PlainEncoder):
    name = "undocumented"


@breaks("options", "no description of width")
class NoDescription(PlainEncoder):
    """An encoder."""

    class Config(PlainEncoder.Config):
        width: int = 3


@breaks("options", "unknown keys pass")
class LetsPass(PlainEncoder):
    """An encoder."""

    class Config(PlainEncoder.Config, extra="ignore"):
        pass


@breaks("options", "can be changed")
class Melting(PlainEncoder):
    """An encoder."""

    class Config(PlainEncoder.Config, frozen=False):
        pass


@breaks("builds", "for images .* it raised RecipeError")
class ImagesFail(PlainEncoder):
    """An encoder."""

    def __init__(self, config, shapes):
        if len(shapes.x) > 1:
            raise ValueError("vectors only")  # `check` should have said so
        super().__init__(config, shapes)


@breaks("builds", "refused every recipe that the kit offers; the first complaint: contract: never")
class RefusesAll(PlainEncoder):
    """An encoder."""

    @classmethod
    def check(cls, config, recipe):
        return ["never"]


@breaks("builds", "k = -1: expected greater than or equal to 1", k=-1)
class WrongOptions(PlainEncoder):
    """An encoder."""

    class Config(PlainEncoder.Config):
        k: int = Field(1, ge=1, description="units")


@breaks("declares", "it has none of transform, perturb, penalty and project")
class NoVerb(ssl_ae.Regularizer):
    """A regularizer."""

    name = "no_verb"


@breaks("declares", "needs = ")
class NeedsAList(ssl_ae.Regularizer):
    """A regularizer."""

    name = "needs_a_list"
    needs = [ssl_ae.Need.CLEAN]  # noqa: RUF012 - the fault


@breaks("declares", "over = 'rows'")
class OverAText(ssl_ae.Regularizer):
    """A regularizer."""

    name = "over_a_text"
    over = "rows"


@breaks("tasks", "tasks = frozenset.*colours")
class UnknownTask(PlainHead):
    """A head."""

    tasks = frozenset({"colours"})


@breaks("recognises", "returned True")
class TakesAll(Source):
    """A source of everything."""

    name, summary = "takes_all", "everything"

    @classmethod
    def recognises(cls, place):
        return True


# -- maps -----------------------------------------------------------------------------------------------------------------


class Encoder(PlainEncoder):
    """h -> `code(h, x)`: what each broken encoder changes."""

    name = "broken"

    def forward(self, x, run):
        return ssl_ae.Point(self.code(self.latent.linear(self.linear(x.flatten(1)).tanh())))

    def code(self, h):
        return h


@breaks("codes", "returned Tensor where")
class NoDistribution(Encoder):
    def forward(self, x, run):
        return self.latent.linear(self.linear(x.flatten(1)))


@breaks("codes", "event shape \\(16,\\), expected \\(19,\\) and \\(17,\\)|expected \\(1,\\) and \\(17,\\)")
class TooNarrow(Encoder):
    def code(self, h):
        return h[:, 1:]


@breaks("posterior", "says 'diag', but forward returned Point")
class SaysDiag(Encoder):
    @classmethod
    def posterior(cls, config):
        return "diag"


class Decoder(PlainDecoder):
    """What each broken decoder changes."""

    name = "broken"


@breaks("label", "conditional = False")
class ReadsTheLabelUndeclared(PlainEncoder):
    """An encoder."""

    def forward(self, x, run):
        q = super().forward(x, run)
        return q if run.condition is None else ssl_ae.Point(q.mean + run.condition.argmax(1, keepdim=True))


@breaks("label", "without a label it is a Independent", posterior="diag")
class NoFeatures(PlainEncoder):
    """An encoder."""

    conditional = True

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.shift = nn.Linear(shapes.classes, shapes.latent)

    def forward(self, x, run):
        q = super().forward(x, run)
        return q if run.condition is None else type(q)(type(q.base_dist)(q.mean + self.shift(run.condition), q.stddev), 1)


@breaks("samples", "forward returned IndependentNormal, not a pair")
class NoPair(Decoder):
    def forward(self, z, run):
        return super().forward(z, run)[0]


@breaks("samples", "event shape \\(105,\\)")
class Flat(Decoder):
    def forward(self, z, run):
        mean = self.linear(z)
        return torch.distributions.Independent(torch.distributions.Normal(mean, 1.0), 1), {}


@breaks("samples", "its guesses of layers are NoneType")
class NoGuesses(Decoder):
    def forward(self, z, run):
        return super().forward(z, run)[0], None


@breaks("likelihood", "says 'bernoulli', but forward returned Independent")
class SaysBernoulli(Decoder):
    @classmethod
    def likelihood(cls, config):
        return "bernoulli"


class Head(PlainHead):
    """What each broken head changes."""

    name = "broken"
    tasks = frozenset({"classes"})

    def forward(self, features):
        return Categorical(logits=self.logits(self.linear(features).float()), validate_args=False)

    def logits(self, raw):
        return raw


@breaks("predictions", "5 outputs were asked for; 1 rows gave \\(1, 6\\)")
class OneClassTooMany(Head):
    def logits(self, raw):
        return torch.cat([raw, raw[:, :1]], 1)


@breaks("deterministic", "two passes over the same rows differ in mean")
class NoisyCode(Encoder):
    def code(self, h):
        return h + 0.1 * torch.randn_like(h)


@breaks("deterministic", "differ in logits")
class DropsAlways(Head):
    def logits(self, raw):
        return nn.functional.dropout(raw, 0.5, training=True)


@breaks("row_law", "differs from that of 7 and 12 rows")
class Centers(Encoder):
    def code(self, h):
        return h - h.mean(0)


@breaks("row_law", "mean of 19 rows differs")
class BatchSpread(Decoder):
    def forward(self, z, run):
        return super().forward(z * z.std(0, correction=0), run)


@breaks("row_law", "changes with the order of the rows")
class CountsRows(Encoder):
    def code(self, h):
        return h + torch.arange(len(h))[:, None] % 7


@breaks("gradients", "no gradient reached linear.weight")
class Detaches(Encoder):
    def forward(self, x, run):
        return ssl_ae.Point(self.latent.linear(self.linear(x.flatten(1)).detach()))


@breaks("gradients", "no gradient reached unused")
class Unused(Head):
    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.unused = nn.Parameter(torch.zeros(3))


@breaks("bf16", "mean is not finite")
class Underflows(Encoder):
    def code(self, h):
        return (1.0 - (h + 8.0).sigmoid()).log()  # sigmoid(8) rounds to 1 in bf16


@breaks("stored", "mean differs after saving and loading")
class Forgets(Encoder):
    running = 0.0

    def code(self, h):
        if self.training:
            self.running = h.detach().mean(0)
        return h - self.running


@breaks("taps", "noise on layer 'h1' changed nothing")
class IgnoresTap(Encoder):
    def forward(self, x, run):
        h = self.linear(x.flatten(1)).tanh()
        run.tap(h, "h1")
        return self.latent(h)


@breaks("taps", "it tapped 'code', a name of the engine's")
class TapsCode(Encoder):
    def forward(self, x, run):
        return ssl_ae.Point(run.tap(self.latent.linear(self.linear(x.flatten(1))), "code"))


@breaks("taps", "layer 'h1' was tapped twice")
class TakesEncodersName(Decoder):
    def forward(self, z, run):
        return super().forward(run.tap(z, "h1"), run)


@breaks("trains", "1 of 3 steps had a gradient that is not finite")
class Explodes(Encoder):
    steps = 0

    def code(self, h):
        self.steps += self.training
        return h / (self.steps < 3)
