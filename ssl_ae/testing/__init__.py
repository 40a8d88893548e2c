"""The contract of a component, as tests. A plugin's whole test file is

    test_contract = ssl_ae.testing.contract(KSparse, k=2)

Each check builds the component for samples of several shapes (those it does not refuse in `check`) and says, where it fails,
what the contract is, what the component did and how to mend it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ssl_ae.errors import PluginError, listing
from ssl_ae.testing import claimed, declared, mapped, penalized, tabled, trained
from ssl_ae.testing.check import Breach, Check
from ssl_ae.testing.world import KINDS, Partner, Subject

__all__ = ["Breach", "checks_for", "contract"]

CHECKS: tuple[Check, ...] = (
    *declared.CHECKS,
    *mapped.CHECKS,
    *claimed.CHECKS,
    *penalized.CHECKS,
    *tabled.CHECKS,
    *trained.CHECKS,
)


def contract(cls: type, *partners: Partner, **options: object) -> Callable[[str], None]:
    """A test function for pytest, with one case a check that applies to the component's kind.

    `options` are the component's own, as a recipe gives them. `partners` are components to try beside it where the kit's plain
    ones do not fit, each a class or (class, options): an encoder that works only with its own decoder and with a penalty beside
    it is tried by `contract(MyEncoder, (MyDecoder, {"bias": False}), MyPenalty)`.
    Raises PluginError when `cls` is no component.
    """
    import pytest  # the rest of the kit also serves `ssl-ae plugins check`, where pytest need not be installed

    checks = dict(checks_for(cls, *partners, **options))

    @pytest.mark.parametrize("check", list(checks))
    def test_contract(check: str) -> None:
        __tracebackhide__ = True
        checks[check]()

    test_contract.__doc__ = f"The contract of {cls.__qualname__}."
    return test_contract


def checks_for(cls: type, *partners: Partner, **options: object) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, function) of every check that applies; a function raises Breach where the component breaks the contract."""
    kind = next((kind for kind, base in KINDS.items() if isinstance(cls, type) and issubclass(cls, base)), None)
    if kind is None:
        bases = listing([f"ssl_ae.{base.__name__}" for base in KINDS.values()])
        raise PluginError(f"{cls!r} has no contract: expected a subclass of {bases}.")
    subject = Subject(cls, kind, partners, options)
    return iter([(check.name, check.on(subject)) for check in CHECKS if kind in check.kinds])
