"""Checks of what a class says about itself: every kind."""

from __future__ import annotations

import inspect

from ssl_ae.registry import options_of
from ssl_ae.testing.check import Check, Finding, check, require
from ssl_ae.testing.world import KINDS, Subject
from ssl_ae.trace import Need, Over

COMPONENTS = tuple(kind for kind in KINDS if kind != "source")
TASKS = {"classes", "regression", "multilabel"}


@check(
    *KINDS,
    rule="the registry accepts the class: `name` is of lower-case letters, digits, _ and -; `version` is a whole number.",
    cure='set `name = "my_component"` in the class, and `version` only when stored weights change their meaning.',
)
def registered(subject: Subject) -> None:
    subject.registry()
    version = getattr(subject.cls, "version", 1)
    require(isinstance(version, int) and version >= 1, f"version = {version!r}.")


@check(
    *KINDS,
    rule="the class has a docstring of its own whose first line says what it does: the formula and where it comes from.",
    cure='begin the class with """formula, in words or symbols (author and year)."""; `ssl-ae plugins show` prints it.',
)
def documented(subject: Subject) -> None:
    text = inspect.cleandoc(subject.cls.__dict__.get("__doc__") or "")
    require(bool(text), "it has no docstring.")
    require(len(text.splitlines()[0].split()) >= 2, f"the first line of its docstring is {text.splitlines()[0]!r}.")


@check(
    *COMPONENTS,
    rule="Config is frozen, refuses unknown keys and describes every option.",
    cure='write `class Config(ssl_ae.Config)` and give each option `Field(default, ge=..., description="effect and unit")`.',
)
def options(subject: Subject) -> None:
    config = subject.cls.Config
    require(config.model_config.get("frozen") is True, "its Config can be changed after it was made (frozen = False).")
    require(config.model_config.get("extra") == "forbid", "its Config lets unknown keys pass: a misspelt option is silent.")
    bare = [name for name, field in options_of(subject.cls).items() if not field.description]
    require(not bare, f"no description of {', '.join(bare)}.")


@check(
    *COMPONENTS,
    rule="the component is built for every sample shape, code size and task that its `check` does not refuse.",
    cure="complain in `check(cls, config, recipe)` about what cannot work; for all else take the sizes from `shapes`.",
)
def builds(subject: Subject) -> None:
    for world in subject.worlds:
        try:
            world.model()
        except Exception as error:
            raise Finding(f"for {world.name} it raised {type(error).__name__}: {error}") from error


@check(
    "regularizer",
    rule="a regularizer says what its penalty is averaged over, what it needs and where it acts, and has at least one verb.",
    cure="set `over` to an ssl_ae.Over, `needs` to a frozenset of ssl_ae.Need, `layers` to a tuple of names; "
    "define transform, perturb, penalty or project.",
)
def declares(subject: Subject) -> None:
    cls = subject.cls
    require(isinstance(cls.over, Over), f"over = {cls.over!r}.")
    needs = cls.needs
    require(isinstance(needs, frozenset) and all(isinstance(need, Need) for need in needs), f"needs = {needs!r}.")
    layers = cls.layers
    require(isinstance(layers, tuple) and all(isinstance(layer, str) for layer in layers), f"layers = {layers!r}.")
    require(isinstance(cls.always, bool), f"always = {cls.always!r}.")
    require(bool(cls.verbs), "it has none of transform, perturb, penalty and project, so it has no effect.")


@check(
    "head",
    "table head",
    rule="`tasks` says what a head predicts: a frozenset of classes, regression and multilabel.",
    cure='set `tasks = frozenset({"classes"})`.',
)
def tasks(subject: Subject) -> None:
    given = subject.cls.tasks
    require(isinstance(given, frozenset) and bool(given) and given <= TASKS, f"tasks = {given!r}.")


@check(
    "source",
    rule="`recognises` answers False, without raising, for a place that does not exist; `summary` is one line.",
    cure="look at the name or at a few bytes, and return False where there is nothing.",
)
def recognises(subject: Subject) -> None:
    answer = subject.cls.recognises("no such place/or data set")
    require(answer is False, f"recognises('no such place/or data set') returned {answer!r}.")
    summary = getattr(subject.cls, "summary", None)
    require(isinstance(summary, str) and len(summary.splitlines()) == 1, f"summary = {summary!r}.")


CHECKS: tuple[Check, ...] = (registered, documented, options, builds, declares, tasks, recognises)
