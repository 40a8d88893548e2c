"""plugins list, show, check and new."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_ae.cli.options import Json, print_json

if TYPE_CHECKING:
    from ssl_ae.registry import Entry, Registry

app = typer.Typer(
    help="Plugins: what is installed, what it does, and the start of your own.", no_args_is_help=True, rich_markup_mode=None
)


class Kind(enum.StrEnum):
    """What `plugins new` can write."""

    encoder = "encoder"
    decoder = "decoder"
    regularizer = "regularizer"
    head = "head"
    table_head = "table-head"


ComponentName = Annotated[str, typer.Argument(metavar="NAME", help="Short name, or plugin/component.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """Every plugin and every component that recipes can name.

    \b
    ssl-ae plugins list
    SSL_AE_PLUGINS=builtins ssl-ae plugins list
    """
    from ssl_ae.registry import Registry

    registry = Registry.discover()
    plugins = [
        {"name": p.name, "distribution": p.distribution, "version": p.version, "status": p.status, "reason": p.reason}
        for p in registry.plugins.values()
    ]
    components = [_named(entry) for entry in registry.entries]
    if json:
        _answer("list", plugins=plugins, components=components)
        return
    for plugin in plugins:
        state = ": ".join(filter(None, [plugin["status"], plugin["reason"]]))
        typer.echo(f"{plugin['name']}  ({plugin['distribution']} {plugin['version']})  {state}")
    typer.echo()
    widths = [max((len(component[key]) for component in components), default=0) for key in ("kind", "full_name")]
    for component in components:
        kind, name = component["kind"].ljust(widths[0]), component["full_name"].ljust(widths[1])
        typer.echo(f"{kind}  {name}  {component['summary']}")


@app.command()
def show(name: ComponentName, json: Json = False) -> None:
    """What a component computes, its options with type, range and default, and who owns it.

    \b
    ssl-ae plugins show kl
    ssl-ae plugins show builtins/mlp
    """
    from ssl_ae.registry import Registry

    entries = _components(Registry.discover(), name)
    found = [_described(entry) for entry in entries]
    if json:
        _answer("show", components=found)
        return
    typer.echo("\n\n".join(map(_page, found)))


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A component, plugin/component, or a plugin for all of its own.")],
    json: Json = False,
) -> None:
    """Hold a component, or all components of a plugin, to the contract. Exit code 1 where one breaks it.

    \b
    ssl-ae plugins check ksparse
    ssl-ae plugins check builtins --json
    """
    from ssl_ae.errors import PluginError
    from ssl_ae.registry import Registry

    registry = Registry.discover()
    plugin = registry.plugins.get(name)
    if plugin is not None and plugin.status == "disabled":
        raise PluginError(f"plugin {name!r} ({plugin.origin}) is disabled: {plugin.reason}.")
    broken = [f"plugin {name!r} ({plugin.origin}) is broken: {plugin.reason}."] if plugin and plugin.status == "broken" else []
    entries = [e for e in registry.entries if e.plugin is plugin or name in (e.cls.name, e.full_name)]
    if not entries and not broken:
        _components(registry, name)  # raises
    found = [_checked(entry, registry) for entry in entries]
    failed = broken + [c["message"] for component in found for c in component["checks"] if not c["passed"]]
    if json:
        _answer("check", passed=not failed, components=found, failures=failed)
    else:
        for component in found:
            verdicts = [c["passed"] for c in component["checks"]]
            verdict = "ok" if component["passed"] else "FAILED"
            typer.echo(f"{verdict:6}  {component['kind']} {component['full_name']}: {sum(verdicts)} of {len(verdicts)} checks")
        for message in failed:
            typer.echo(f"\n{message}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the plugin and its component, such as topk.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the folder ssl-ae-NAME goes.")] = Path("."),
    kind: Annotated[Kind, typer.Option("--kind", help="What the plugin adds.")] = Kind.encoder,
    json: Json = False,
) -> None:
    """Write a package with a working component and its test: the start of your own plugin.

    \b
    ssl-ae plugins new topk
    ssl-ae plugins new group_lasso --kind regularizer --out ~/plugins
    """
    from ssl_ae.registry import Registry
    from ssl_ae.scaffold import write_package

    folder = write_package(name, kind, out, Registry.discover())
    if json:
        _answer("new", outputs={"package": str(folder)})
        return
    typer.echo(f"{folder}: a plugin with one {kind}. Next:\n")
    typer.echo(f"    pip install -e {folder}\n    ssl-ae plugins check {name}\n    pytest {folder}")


def _answer(command: str, outputs: dict[str, str] | None = None, **more: Any) -> None:
    from ssl_ae.stages.outcome import Outcome

    outcome = Outcome(f"plugins {command}", None, outputs={key: Path(path) for key, path in (outputs or {}).items()}, more=more)
    print_json(outcome.as_json())


def _components(registry: Registry, name: str) -> list[Entry]:
    """All of this short or full name, of any kind. Raises PluginError: what is known, the nearest match."""
    from ssl_ae.errors import PluginError, did_you_mean

    found = registry.search(name)
    if found:
        return found
    plugin = registry.plugins.get(name.split("/")[0])
    if plugin is not None and plugin.status != "loaded":
        raise PluginError(f"plugin {plugin.name!r} ({plugin.origin}) is {plugin.status}: {plugin.reason}.")
    if plugin is not None and "/" not in name:
        raise PluginError(f"{name!r} is a plugin, not a component. See `ssl-ae plugins list` for what it holds.")
    known = sorted({text for entry in registry.entries for text in (entry.cls.name, entry.full_name)} | set(registry.plugins))
    raise PluginError(f"nothing is called {name!r}.{did_you_mean(name, known)} `ssl-ae plugins list` prints every name.")


def _named(entry: Entry) -> dict[str, str]:
    return {"kind": entry.kind, "name": entry.cls.name, "full_name": entry.full_name, "summary": entry.summary}


def _described(entry: Entry) -> dict[str, Any]:
    import inspect

    from ssl_ae.registry import options_of

    plugin = entry.plugin
    return {
        **_named(entry),
        "version": getattr(entry.cls, "version", None),
        "plugin": {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version},
        "docstring": inspect.getdoc(entry.cls) or "",
        "class": f"{entry.cls.__module__}.{entry.cls.__qualname__}",
        "declares": _declared(entry),
        "options": [_option(name, field) for name, field in (options_of(entry.cls) | _engine_options(entry)).items()],
    }


DECLARED = {
    "encoder": ("noisy", "differentiable", "reads_decoder"),
    "decoder": ("reads_layers",),
    "regularizer": ("verbs", "over", "needs", "always", "of_samples"),
    "head": ("tasks", "fitted_at_once", "reads_samples"),
}


def _declared(entry: Entry) -> dict[str, Any]:
    """What the class tells the engine, beside its options."""
    names = DECLARED.get(entry.kind, ())
    if entry.kind == "regularizer" and "penalty" not in entry.cls.verbs:
        names = tuple(name for name in names if name not in ("over", "needs"))
    if entry.kind == "head" and entry.cls.fitted_at_once:
        names = (*names, "reads_unlabeled", "fits_on")
    values = {name: getattr(entry.cls, name) for name in names}
    return {name: sorted(map(str, value)) if isinstance(value, frozenset) else value for name, value in values.items()}


def _engine_options(entry: Entry) -> dict[str, Any]:
    """What the engine itself reads of a regularizer's entry, where it has an effect, with the component's own default."""
    from ssl_ae.recipe import RegularizerEntry

    if entry.kind != "regularizer":
        return {}
    cls, known = entry.cls, RegularizerEntry.model_fields
    names = ("weight", "warmup_steps") if "penalty" in cls.verbs else ()
    found = {name: known[name] for name in names}
    if "perturb" in cls.verbs or "layers" in vars(cls):
        found["layers"] = known["layers"].merge_field_infos(known["layers"], default=tuple(cls.layers))
    return found


def _option(name: str, field: Any) -> dict[str, Any]:
    """One option of a Config: the JSON of its field."""
    from pydantic import TypeAdapter

    default = None if field.is_required() else TypeAdapter(field.annotation).dump_python(field.get_default(), mode="json")
    return {
        "name": name,
        "type": _type_name(field.annotation),
        "range": _range_of(field.metadata),
        "required": field.is_required(),
        "default": default,
        "description": field.description or "",
    }


def _type_name(annotation: Any) -> str:
    """`int`, `relu | tanh`, `int or null`, `list of int`: what a recipe may say."""
    import types
    import typing

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return " ".join(filter(None, [_type_name(arguments[0]), _range_of(arguments[1:])]))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _range_of(metadata: Any) -> str:
    """`>= 0, < 1` from the constraints of a field."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits: list[str] = []
    for item in metadata:
        inner = getattr(item, "metadata", None)  # pydantic nests the constraints of Annotated[int, Field(...)]
        limits += [_range_of(inner)] if inner else []
        limits += [f"{sign} {getattr(item, key)}" for key, sign in signs.items() if getattr(item, key, None) is not None]
    return ", ".join(filter(None, limits))


def _page(component: dict[str, Any]) -> str:
    import textwrap

    owner = component["plugin"]
    lines = [
        f"{component['full_name']}  ({component['kind']}, {owner['distribution']} {owner['version']})",
        *(f"    {line}".rstrip() for line in component["docstring"].splitlines()),
        f"  class: {component['class']}",
    ]
    told = "; ".join(filter(None, (_declaration(name, value) for name, value in component["declares"].items())))
    lines += [f"  declares: {told}"] if told else []
    for option in component["options"]:
        kind = option["type"] + (f" ({option['range']})" if option["range"] else "")
        start = "required" if option["required"] else f"default {_as_written(option['default'])}"
        first = f"  {option['name']}: {kind}; {start}"
        lines += textwrap.wrap(first, WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
        lines.append(f"      {option['description']}")
    return "\n".join(lines)


WIDTH = 120


def _declaration(name: str, value: Any) -> str:
    """`needs clean`, `noisy`; nothing where there is nothing to say."""
    word = name.replace("_", " ")
    if isinstance(value, bool):
        usual = name == "differentiable"
        return "" if value == usual else f"not {word}" if usual else word
    return f"{word} {', '.join(value) if isinstance(value, list) else value}" if value else ""


def _as_written(value: Any) -> str:
    """A default as a recipe would say it."""
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _checked(entry: Entry, registry: Registry) -> dict[str, Any]:
    """Every check of the contract, with the plugin's other components as partners to try."""
    from ssl_ae.testing import Breach, checks_for

    mates = [other for other in registry.entries if other.plugin is entry.plugin and other.cls is not entry.cls]
    partners = [mate.cls for mate in mates if mate.kind != "source"]
    results = []
    for name, function in checks_for(entry.cls, *partners):
        try:
            function()
            results.append({"name": name, "passed": True, "message": ""})
        except Breach as breach:
            results.append({"name": name, "passed": False, "message": str(breach)})
            if name in ("registered", "builds"):
                break  # the other checks would say the same
    return {**_named(entry), "passed": all(result["passed"] for result in results), "checks": results}
