"""What a check is: a rule, a way to look at a component, and the cure for one that breaks the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssl_ae.randomness import seed_draws

if TYPE_CHECKING:
    from ssl_ae.testing.world import Subject


class Breach(AssertionError):
    """A component breaks its contract. The message says the rule, what the component did, and the cure."""


class Finding(Exception):
    """What a component did, in words that follow its name."""


def require(ok: bool, did: str) -> None:
    """Raises Finding unless `ok`."""
    if not ok:
        raise Finding(did)


@dataclass(frozen=True)
class Check:
    name: str
    kinds: frozenset[str]
    rule: str
    cure: str
    look: Callable[[Subject], None]  # raises Finding, or whatever the component raises

    def on(self, subject: Subject) -> Callable[[], None]:
        """The check as a function of nothing. Its random numbers are the same each time and leave torch's generator alone."""
        return functools.partial(self._run, subject)

    def _run(self, subject: Subject) -> None:
        __tracebackhide__ = True
        with torch.random.fork_rng(devices=[]):
            seed_draws(0)
            try:
                self.look(subject)
            except Finding as finding:
                raise Breach(self._message(subject, str(finding))) from None
            except Exception as error:  # a component may raise anything, and all of it breaks the rule
                raise Breach(self._message(subject, f"raised {type(error).__name__}: {error}")) from error

    def _message(self, subject: Subject, did: str) -> str:
        who = f"{subject.kind} {subject.cls.__qualname__}"
        return f"{who} breaks the contract ({self.name}).\n  contract: {self.rule}\n  it did:   {did}\n  cure:     {self.cure}"


def check(*kinds: str, rule: str, cure: str) -> Callable[[Callable[[Subject], None]], Check]:
    """Make a Check of a function; its name becomes the check's."""

    def wrap(look: Callable[[Subject], None]) -> Check:
        return Check(look.__name__, frozenset(kinds), rule, cure, look)

    return wrap
