"""The kit finds what it is there to find: for each check a component with exactly that fault."""

import re

import broken
import broken_claims  # noqa: F401 - fills broken.BROKEN
import broken_maps
import broken_verbs
import claim_kit
import pytest
import torch
from pydantic import Field

import ssl_ae
from ssl_ae.errors import PluginError
from ssl_ae.testing import CHECKS, Breach, checks_for, contract
from ssl_ae.testing.companions import PlainDecoder, PlainEncoder, PlainHead


@pytest.mark.parametrize(("check", "cls", "options", "message"), broken.BROKEN)
def test_the_check_that_must_fail_fails(check, cls, options, message):
    with pytest.raises(Breach) as breach:
        dict(checks_for(cls, **options))[check]()
    text = str(breach.value)
    assert re.search(message, text), text
    assert re.match(rf".* {cls.__name__} breaks the contract \({check}\)\.\n  contract: .+\n  it did: .+\n  cure: .+", text, re.S)


def test_every_check_has_a_component_that_fails_it():
    assert {case.values[0] for case in broken.BROKEN} == {check.name for check in CHECKS}


GOOD = [
    PlainEncoder,
    PlainDecoder,
    PlainHead,
    broken_verbs.Means,
    claim_kit.Stacked,
    claim_kit.StackedDecoder,
    claim_kit.Normalises,
]


@pytest.mark.parametrize("cls", GOOD, ids=lambda cls: cls.__name__)
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


def test_a_component_that_wants_several_partners_with_options():
    """A decoder with an option that is not its default, and two regularizers of three, one of which the encoder refuses."""

    class Own(PlainDecoder):
        """Scaled."""

        name = "own"

        class Config(ssl_ae.Config):
            gain: int = Field(1, description="factor")

    class Penalty(broken_verbs.Penalty):
        """Wanted."""

        name = "penalty"

        def value(self, z):
            return z.square().sum(1)

    class Other(Penalty):
        """Wanted too."""

        name = "other"

    class Refused(Penalty):
        """Refused."""

        name = "refused"

    class Picky(PlainEncoder):
        """Works with these alone."""

        name = "picky"

        @classmethod
        def check(cls, config, recipe):
            fits = recipe.decoder.cls is Own and recipe.decoder.config.gain == 3
            return [] if fits and {part.cls for part in recipe.regularizers} == {Penalty, Other} else ["needs its partners"]

    checks = dict(checks_for(Picky, (Own, {"gain": 3}), Refused, Other, Penalty))
    for check in checks.values():
        check()
    with pytest.raises(Breach, match="needs its partners"):
        dict(checks_for(Picky, Own, Refused, Other, Penalty))["builds"]()

    class Demanding(Penalty):
        """A regularizer that works beside that encoder, that decoder and the two others, which follow it."""

        name = "demanding"

        @classmethod
        def check(cls, config, recipe):
            found = [part.cls for part in recipe.regularizers]
            return [] if recipe.encoder.cls is Lenient and found == [Demanding, Penalty, Other] else ["needs its partners"]

    class Lenient(PlainEncoder):
        """Codes."""

        name = "lenient"

    for check in dict(checks_for(Demanding, Lenient, Penalty, Refused, Other)).values():
        check()


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
        contract(broken_maps.Centers)("row_law")


def test_the_contract_of_something_else_is_an_error():
    with pytest.raises(PluginError, match=r"<class 'int'> has no contract: expected a subclass of ssl_ae\.Encoder, ssl_ae\."):
        contract(int)


def test_checks_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dict(checks_for(PlainEncoder))["trains"]()
    assert torch.equal(torch.rand(3), expected)
