"""Encoders and decoders whose inside is not what they claim, and parts that show what cannot be drawn; each with one fault."""

import torch
from broken import breaks
from claim_kit import WIDTH, Layer, Normalises, Stacked, StackedDecoder
from pydantic import Field
from torch import nn
from torch.distributions import Categorical

import ssl_ae
from ssl_ae.testing.companions import PlainDecoder, PlainEncoder, PlainHead

# -- slices ---------------------------------------------------------------------------------------------------------------


@breaks("slices", "parts\\(config\\) = 3, but slices\\(\\) gave 2")
class Miscounts(Stacked):
    @classmethod
    def parts(cls, config):
        return 3


@breaks("slices", "parts\\(config\\) = 2, but slices\\(\\) gave 0")
class PromisesSlices(PlainEncoder):
    @classmethod
    def parts(cls, config):
        return 2


@breaks("slices", "slices\\(\\) gave Linear, Linear, which is no Encoder")
class BareLayers(Stacked):
    def slices(self):
        return self.first.linear, self.second.linear


@breaks("slices", "from \\(3, 7, 5\\) to \\(17,\\) is expected")
class Upward(Stacked):
    def slices(self):
        return self.second, self.first


@breaks("slices", "slices do not fit one another: \\(7,\\) to \\(8,\\)")
class Mislabels(Stacked):
    def slices(self):
        wrong = Layer(ssl_ae.Shapes((WIDTH + 1,), self.shapes.latent))
        return self.first, wrong


@breaks("slices", "another mean than it does as a whole")
class Rescales(Stacked):
    def forward(self, x, run):
        return self.second(run.tap(2 * self.first(x, run).mean, "h1"), run)


@breaks("slices", "two slices share a parameter")
class Ties(Stacked):
    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.second.also = self.first.linear.weight


@breaks("slices", "2 parameters of its slices are not its own")
class FreshSlices(Stacked):
    def slices(self):
        copy = Layer(self.second.shapes)
        with torch.no_grad():
            copy.load_state_dict(self.second.state_dict())
        return self.first, copy


@breaks("slices", "its slices go .* from \\(17,\\) to \\(3, 7, 5\\) is expected")
class EncodersOrder(StackedDecoder):
    """Its slices begin at x."""

    def slices(self):
        return self.second, self.first


@breaks("slices", "another mean than it does as a whole")
class Activates(StackedDecoder):
    """A layer that its slices lack."""

    def forward(self, z, run):
        return self.second(self.first(z, run)[0].mean.tanh(), run)


# -- ranges, gradients ----------------------------------------------------------------------------------------------------


@breaks("unit_interval", "h1 reached \\[.*\\] for inputs up to 1000")
class Unbounded(PlainEncoder):
    """h1 = 1/2 + (W x + b) / 1000: in [0, 1] for small inputs only."""

    def forward(self, x, run):
        return self.latent(run.tap(0.5 + self.linear(x.flatten(1)) / 1000, "h1"))

    @classmethod
    def unit_interval(cls, config):
        return ("h1",)


@breaks("unit_interval", "code reached \\[-")
class LinearCode(PlainEncoder):
    @classmethod
    def unit_interval(cls, config):
        return ("code",)


@breaks("unit_interval", "it names 'h2', but has the layers input, h1, code")
class NamesNothing(Stacked):
    @classmethod
    def unit_interval(cls, config):
        return ("h1", "h2")


@breaks("squared_jacobian", "autograd says")
class ForgetsSquare(Stacked):
    def squared_jacobian(self, layers):
        return super().squared_jacobian(layers).sqrt()


@breaks("squared_jacobian", "autograd says")
class WeightsAlone(PlainEncoder):
    """|W|_F^2, without the slope of tanh."""

    def squared_jacobian(self, layers):
        return (self.latent.linear.weight @ self.linear.weight).square().sum().expand(len(layers["h1"]))


@breaks("squared_jacobian", "19 rows gave shape \\(\\)")
class OneNumber(Stacked):
    def squared_jacobian(self, layers):
        return super().squared_jacobian(layers).mean()


@breaks("differentiable", "differentiable = True, but no gradient reached x")
class DetachesInput(PlainEncoder):
    def forward(self, x, run):
        return super().forward(x.detach(), run)


@breaks("differentiable", "differentiable = False, but a gradient reached x")
class Modest(PlainEncoder):
    differentiable = False


# -- noise, partners, statistics ------------------------------------------------------------------------------------------


@breaks("noisy", "noisy = False, but two training passes with run.step = None differ in h1, code")
class DropsSecretly(PlainEncoder):
    def forward(self, x, run):
        h = nn.functional.dropout(self.linear(x.flatten(1)).tanh(), 0.5, self.training)
        return self.latent(run.tap(h, "h1"))


@breaks("noisy", "noisy = False, but two training passes with run.step = 1000000 differ in code")
class GrowsNoisy(PlainEncoder):
    def forward(self, x, run):
        z = self.latent.linear(run.tap(self.linear(x.flatten(1)).tanh(), "h1"))
        return ssl_ae.Point(z if run.step is None else z + (run.step > 5_000) * torch.randn_like(z))


@breaks("noisy", "noisy = True, but two training passes with run.step = None differ in code")
class NeverQuiet(PlainEncoder):
    noisy = True

    def forward(self, x, run):
        z = self.latent.linear(run.tap(self.linear(x.flatten(1)).tanh(), "h1"))
        return ssl_ae.Point(z + torch.randn_like(z) if self.training else z)


@breaks("reads_decoder", "reads_decoder = False, but another decoder changed the code")
class ReadsSecretly(PlainEncoder):
    """z = W' x with the decoder's W."""

    def forward(self, x, run):
        return ssl_ae.Point(x.flatten(1) @ run.decoder.linear.weight)


@breaks("reads_decoder", "reads_decoder = True, but another decoder did not change the code")
class Pretends(PlainEncoder):
    reads_decoder = True


class Running(ssl_ae.BatchMoments):
    """Learns whatever it is told."""

    def forward(self, h, learn=True, *uniform):
        return super().forward(h, True, *uniform)


class Zero(ssl_ae.BatchMoments):
    """Divides by nothing."""

    def forward(self, h, learn=True, *uniform):
        mean, std = super().forward(h, learn, *uniform)
        return mean, 0.0 * std


class Skips(PlainDecoder):
    """p(x|z) with a skip connection from the input: what the two below change."""

    name = "skips"


@breaks("reads_layers", "reads_layers = False, but a code alone raised KeyError: 'input'")
class SkipsSecretly(Skips):
    def forward(self, z, run):
        return self.output(self.linear(z).unflatten(1, (1, *self.shapes.x)) + run.taps["input"][:, None]), {}


@breaks("reads_layers", "reads_layers = False, but layers change p\\(x\\|z\\)")
class SkipsWhereItCan(Skips):
    def forward(self, z, run):
        mean = self.linear(z).unflatten(1, (1, *self.shapes.x))
        return self.output(mean + run.taps["input"][:, None] if "input" in run.taps else mean), {}


@breaks("reads_layers", "reads_layers = True, but layers do not change p\\(x\\|z\\)")
class SkipsNothing(Skips):
    reads_layers = True


@breaks("statistics", "a pass that may not learn changed moments.mean, moments.var")
class LearnsAlways(Normalises):
    moments_class = Running


@breaks("statistics", "layer 'h1' was divided by a deviation that is not positive")
class DividesByNothing(Normalises):
    moments_class = Zero


# -- pictures -------------------------------------------------------------------------------------------------------------


@breaks("pictures", "tiles 'filters' must be finite numbers .*; got \\(29,\\)")
class ShowsBiases(PlainEncoder):
    def pictures(self, trace):
        return [ssl_ae.Tiles("filters", "Biases", self.linear.bias)]


@breaks("pictures", "histogram 'activity' needs values \\(n,\\), some finite; got \\(19, 29\\)")
class ShowsATable(PlainEncoder):
    def pictures(self, trace):
        return [ssl_ae.Histogram("activity", "Activity", trace.taps["h1"], "activity")]


@breaks("pictures", "'Mean activity': a name is that of a file")
class NamesAFile(PlainDecoder):
    """A decoder."""

    name = "names_a_file"

    def pictures(self, trace):
        return [ssl_ae.Lines("Mean activity", "Activity", {"unit": trace.z[0]}, "unit", "activity")]


@breaks("pictures", "a component's picture is Tiles, Histogram or Lines, not Tensor")
class ShowsNumbers(ssl_ae.Regularizer):
    """A regularizer."""

    name = "shows_numbers"

    class Config(ssl_ae.Config):
        size: float = Field(1.0, description="factor")

    def perturb(self, h, layer):
        return self.config.size * h

    def pictures(self, trace):
        return [trace.z]


@breaks("pictures", "it changed encoder.linear.weight")
class Tidies(PlainEncoder):
    def pictures(self, trace):
        self.linear.weight /= self.linear.weight.norm(dim=1, keepdim=True)
        return []


@breaks("pictures", "it put the model into training mode")
class WakesUp(PlainEncoder):
    def pictures(self, trace):
        trace.model.train()
        return []


# -- convex heads ---------------------------------------------------------------------------------------------------------


class Convex(PlainHead):
    """The softmax: what each broken convex head changes."""

    name = "broken"
    tasks = frozenset({"classes"})

    def forward(self, features):
        return self.output(self.linear(features))

    def output(self, raw):
        return Categorical(logits=raw.float(), validate_args=False)

    @classmethod
    def convex(cls, config):
        return True

    def affine(self):
        return self.linear

    def gradient(self, p_y, batch):
        return (p_y.probs - nn.functional.one_hot(batch.y, p_y.probs.shape[1])) * batch.weight_y[:, None]


@breaks("convex", "it also trains temperature")
class Tempered(Convex):
    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.output(self.linear(features) * self.temperature)


@breaks("convex", "output\\(W z \\+ b\\) is not what it predicts")
class Doubled(Convex):
    def forward(self, features):
        return self.output(2 * self.linear(features))


@breaks("convex", "half-way between two values of W z \\+ b is above theirs")
class Waves(Convex):
    def output(self, raw):
        return super().output(3 * raw.sin())


@breaks("convex", "gradient is not what autograd finds")
class Unweighted(Convex):
    def gradient(self, p_y, batch):
        return p_y.probs - nn.functional.one_hot(batch.y, p_y.probs.shape[1])


@breaks("convex", "declares convex without gradient")
class Promises(Convex):
    gradient = PlainHead.gradient
