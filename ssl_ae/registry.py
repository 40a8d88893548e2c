"""Finds plugins by entry point and their components by name. Never last-wins, never renamed, never silently dropped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from ssl_ae import hookspecs
from ssl_ae.components import Component, Decoder, Encoder, Head, Regularizer, TableHead
from ssl_ae.data.sources import Source
from ssl_ae.errors import PluginError, did_you_mean, listing

GROUP = "ssl_ae"
ALLOW_LIST = "SSL_AE_PLUGINS"
NAME = re.compile(r"[a-z][a-z0-9_-]*")  # of a component; capitals would make two names that read alike
KINDS: dict[str, tuple[type, ...]] = {
    "encoder": (Encoder,),
    "decoder": (Decoder,),
    "regularizer": (Regularizer,),
    "head": (Head, TableHead),
    "source": (Source,),
}


@dataclass
class Plugin:
    """One entry point: `loaded`, `disabled` by the allow-list, or `broken` with the reason."""

    name: str
    distribution: str
    version: str
    status: str = "loaded"
    reason: str = ""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Entry:
    """A component (or source) and the plugin that owns it."""

    kind: str
    cls: type
    plugin: Plugin

    @property
    def full_name(self) -> str:
        return f"{self.plugin.name}/{self.cls.name}"

    @property
    def summary(self) -> str:
        return ((self.cls.__doc__ or "").strip().splitlines() or [""])[0]


@dataclass
class Registry:
    """The plugins of this environment. `Registry.discover()` is the usual way to get one."""

    plugins: dict[str, Plugin] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._manager = pluggy.PluginManager("ssl_ae")
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def discover(cls, entry_points: Iterable[metadata.EntryPoint] | None = None) -> Registry:
        """Load every entry point of group `ssl_ae`, or those that SSL_AE_PLUGINS=a,b allows.

        Raises PluginError when two distributions use one entry-point name: there is no right one to drop.
        """
        registry = cls()
        allowed = _allowed()
        points = sorted(metadata.entry_points(group=GROUP) if entry_points is None else entry_points, key=lambda p: p.name)
        for point in points:
            distribution, version = (point.dist.name, point.dist.version) if point.dist else (point.value, "")
            plugin = Plugin(point.name, distribution, version)
            registry._claim(plugin)
            if allowed is not None and point.name not in allowed:
                plugin.status, plugin.reason = "disabled", f"not named in {ALLOW_LIST}"
                continue
            try:
                registry._register(plugin, point.load())
            except Exception as error:  # whatever a stranger's module does when imported, the other plugins go on
                plugin.status, plugin.reason = "broken", f"{type(error).__name__}: {error}"
        for name in sorted((allowed or set()) - set(registry.plugins)):
            raise PluginError(
                f"{ALLOW_LIST} names {name!r}, which is not installed; installed: {listing(registry.plugins, 'and')}."
                + did_you_mean(name, registry.plugins)
            )
        return registry

    def add(self, name: str, module: ModuleType | Any, distribution: str = "(local)", version: str = "") -> None:
        """Register a module or object with hook implementations by hand. Raises PluginError when it breaks the contract."""
        plugin = Plugin(name, distribution, version)
        self._claim(plugin)
        try:
            self._register(plugin, module)
        except Exception as error:
            raise PluginError(f"plugin {plugin.name!r} ({plugin.origin}): {error}") from error

    def of_kind(self, kind: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.kind == kind)

    def find(self, kind: str, name: str, where: str = "") -> Entry:
        """The component of a kind by short name (while it is unique) or full name `plugin/component`.

        Raises PluginError: unknown (nearest match, what is installed), ambiguous (all owners), owner broken or disabled.
        """
        place = f"{where} = {name!r}: " if where else ""
        found = [entry for entry in self.of_kind(kind) if name in (entry.full_name, entry.cls.name)]
        if len(found) == 1:
            return found[0]
        if found:
            owners = listing([f"{e.full_name} ({e.plugin.origin})" for e in sorted(found, key=lambda e: e.full_name)], "and")
            raise PluginError(f"{place}{kind} {name!r} is ambiguous: {owners}. Write the full name.")
        owner = self.plugins.get(name.split("/")[0]) if "/" in name else None
        if owner is not None and owner.status != "loaded":
            raise PluginError(f"{place}plugin {owner.name!r} ({owner.origin}) is {owner.status}: {owner.reason}.")
        names = sorted({entry.cls.name for entry in self.of_kind(kind)})
        near = [entry.full_name for entry in self.of_kind(kind)] if "/" in name else names
        message = f"{place}there is no {kind} of this name; installed: {listing(names, 'and')}." + did_you_mean(name, near)
        broken = [f"{plugin.name} ({plugin.reason})" for plugin in self.plugins.values() if plugin.status == "broken"]
        if broken:
            message += f" Broken plugins, one of which may hold it: {', '.join(broken)}."
        raise PluginError(message)

    def search(self, name: str) -> list[Entry]:
        """Every component of any kind that has this short or full name."""
        return [entry for entry in self.entries if name in (entry.full_name, entry.cls.name)]

    def sources(self) -> list[type[Source]]:
        return [entry.cls for entry in self.of_kind("source")]

    def _claim(self, plugin: Plugin) -> None:
        if plugin.name in self.plugins:
            raise PluginError(
                f"two distributions register the plugin name {plugin.name!r}: {self.plugins[plugin.name].origin} and "
                f"{plugin.origin}. Uninstall one, or ask its author to rename the entry point."
            )
        self.plugins[plugin.name] = plugin

    def _register(self, plugin: Plugin, module: ModuleType | Any) -> None:
        try:
            self._manager.register(module, name=plugin.name)
            self._manager.check_pending()
            entries = [entry for kind in KINDS for entry in self._collect(plugin, kind)]
            if not entries:
                raise PluginError("it offers no component; put @ssl_ae.hookimpl above each of its hooks")
        except Exception:
            if self._manager.has_plugin(plugin.name):
                self._manager.unregister(name=plugin.name)
            raise
        self.entries.extend(entries)

    def _collect(self, plugin: Plugin, kind: str) -> Iterator[Entry]:
        hook = getattr(self._manager.hook, f"ssl_ae_{kind}s")
        seen: set[str] = set()
        for implementation in hook.get_hookimpls():
            if implementation.plugin_name != plugin.name:
                continue
            for cls in implementation.function():
                bases = listing([f"ssl_ae.{base.__name__}" for base in KINDS[kind]])
                if not (isinstance(cls, type) and issubclass(cls, KINDS[kind])):
                    raise PluginError(f"ssl_ae_{kind}s returned {cls!r}, which is no subclass of {bases}")
                name = getattr(cls, "name", None)
                if not isinstance(name, str) or not NAME.fullmatch(name):
                    raise PluginError(f"{cls.__qualname__}.name = {name!r}: expected lower-case letters, digits, _ and -")
                if name in seen:
                    raise PluginError(f"ssl_ae_{kind}s returned two classes named {name!r}")
                seen.add(name)
                yield Entry(kind, cls, plugin)


def options_of(cls: type) -> dict[str, Any]:
    """The option fields of a component by name; sources have none."""
    return cls.Config.model_fields if issubclass(cls, Component) else {}


def _allowed() -> set[str] | None:
    text = os.environ.get(ALLOW_LIST)
    return None if text is None else {name.strip() for name in text.split(",") if name.strip()}
