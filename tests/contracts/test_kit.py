"""The kit finds what it is there to find: for each check a component with exactly that fault."""

import re
from dataclasses import replace

import pytest
import torch
from pydantic import Field
from torch import nn
from torch.distributions import Categorical

import ssl_ae
from ssl_ae.data.sources import Source
from ssl_ae.errors import PluginError
from ssl_ae.testing import CHECKS, Breach, checks_for, contract
from ssl_ae.testing.companions import PlainDecoder, PlainEncoder, PlainHead

BROKEN: list = []


def breaks(check, message, **options):
    """This class fails `check`, and the failure says `message`."""

    def keep(cls):
        BROKEN.append(pytest.param(check, cls, options, message, id=f"{check}-{cls.__name__}"))
        return cls

    return keep


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


@breaks("samples", "forward returned Independent, not a pair")
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


# -- the tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "cls", "options", "message"), BROKEN)
def test_the_check_that_must_fail_fails(check, cls, options, message):
    with pytest.raises(Breach) as breach:
        dict(checks_for(cls, **options))[check]()
    text = str(breach.value)
    assert re.search(message, text), text
    assert re.match(rf".* {cls.__name__} breaks the contract \({check}\)\.\n  contract: .+\n  it did: .+\n  cure: .+", text, re.S)


def test_every_check_has_a_component_that_fails_it():
    assert {case.values[0] for case in BROKEN} == {check.name for check in CHECKS}


@pytest.mark.parametrize("cls", [PlainEncoder, PlainDecoder, PlainHead, Means], ids=lambda cls: cls.__name__)
def test_a_good_component_passes(cls):
    for _, check in checks_for(cls):
        check()


def test_a_component_that_works_only_with_its_own_partner():
    class Own(PlainDecoder):
        """Reads twice the code."""

        name = "own"

    class Picky(PlainEncoder):
        """Works with its own decoder alone."""

        name = "picky"

        @classmethod
        def check(cls, config, recipe):
            return [] if recipe.decoder.cls is Own else ["needs decoder own"]

    for _, check in checks_for(Picky, Own):
        check()
    with pytest.raises(Breach, match="needs decoder own"):
        dict(checks_for(Picky))["builds"]()


def test_a_component_may_refuse_shapes():
    class VectorsOnly(PlainEncoder):
        """Works on vectors."""

        @classmethod
        def check(cls, config, recipe):
            return [] if len(recipe.shapes.x) == 1 else ["vectors only"]

        def __init__(self, config, shapes):
            assert len(shapes.x) == 1
            super().__init__(config, shapes)

    for _, check in checks_for(VectorsOnly):
        check()


def test_contract_is_a_test_that_pytest_collects():
    test = contract(PlainEncoder)
    (mark,) = test.pytestmark
    assert mark.name == "parametrize"
    assert mark.args == ("check", [name for name, _ in checks_for(PlainEncoder)])
    test("row_law")
    with pytest.raises(Breach, match="row_law"):
        contract(Centers)("row_law")


def test_the_contract_of_something_else_is_an_error():
    with pytest.raises(PluginError, match=r"<class 'int'> has no contract: expected a subclass of ssl_ae\.Encoder, ssl_ae\."):
        contract(int)


def test_checks_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dict(checks_for(PlainEncoder))["trains"]()
    assert torch.equal(torch.rand(3), expected)
