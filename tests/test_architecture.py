"""The house stays as it was drawn: floors, owners, short files, no technique's name in the engine. No ignore list."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "ssl_ae"
BUILTINS = ROOT / "plugins" / "ssl_ae_builtins"

# From the ground up. A room imports only from floors below its own; rooms of one floor do not know each other.
FLOORS = [
    {"errors"},
    {"files", "stopping", "memory", "cores", "trace", "randomness", "progress", "moments", "pictures", "findings"},
    {"replay", "latent", "likelihood", "tables", "data.card", "data.keys", "data.tar"},
    {"data.sources", "data.damage", "data.holdout", "data.moments", "data.samples", "data.order", "latents"},
    {"data.targets", "data.shards", "data.remote", "data.loading"},
    {"components", "hookspecs", "data.label_values"},
    {"registry", "recipe", "data.labels"},
    {"data.foreign"},
    {"resolve", "data.dataset"},
    {"data.kinds"},
    {"distributed", "data.pack", "runs", "scaffold_modules", "checkpoint", "metrics", "figures", "tracking"},
    {"objective", "scaffold", "neighbours", "choosing", "comparing"},
    {"model"},
    {"plan", "validation", "optimizing", "bounds"},
    {"stepping"},
    {"training", "solving"},
    {"stages"},
    {"testing", "doctor"},
    {"cli"},
]
# files that make one room: a package, or the kinds of source that come in through a hook like any plugin's
ROOMS = {
    "distributed": "distributed",
    "tracking": "tracking",
    "figures": "figures",
    "stages": "stages",
    "testing": "testing",
    "doctor": "doctor",
    "cli": "cli",
    "data.sources": "data.kinds",
}
ROOM_OF = {
    "data.sources.targets": "data.targets",
    "data.sources": "data.sources",
    "__init__": "front",
    "__main__": "front",
}

OWNERS = {
    "mlflow": {"tracking"},
    "webdataset": {"data.shards"},
    "pyarrow": {"tables"},
    "typer": {"cli"},
    "pluggy": {"hookspecs", "registry"},
    "torch.distributed": {"distributed"},
    "torch.nn.parallel": {"distributed"},
    "yaml": {"recipe"},
    "safetensors": {"checkpoint"},
    "filelock": {"runs"},
    "rich": {"progress"},
    "matplotlib": {"figures"},
    "faiss": {"neighbours"},
    "scipy": {"solving", "comparing"},
    "packaging": {"doctor"},
    "fsspec": {"data.remote"},
    "aiohttp": {"data.remote"},
    "ctypes": {"memory"},
}
FORBIDDEN_ROOMS = {"utils", "common", "helpers", "base", "misc", "types"}
LONGEST = 400


@cache
def modules() -> dict[str, Path]:
    """{dotted name under ssl_ae: file}."""
    found = {}
    for path in sorted(ENGINE.rglob("*.py")):
        parts = path.relative_to(ENGINE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def room(module: str) -> str:
    if module in ROOM_OF:
        return ROOM_OF[module]
    return next((name for package, name in ROOMS.items() if module == package or module.startswith(f"{package}.")), module)


@cache
def imports(path: Path, runtime_only: bool = True) -> set[str]:
    """Every dotted name a file imports, wherever in the file; those under `if TYPE_CHECKING` only on request."""
    tree, found = ast.parse(path.read_text()), set()
    skipped = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inner_imports(path: Path) -> set[str]:
    """Modules of the engine that a file imports."""
    known, found = set(modules()), set()
    for name in imports(path):
        if name.startswith("ssl_ae.") and name.removeprefix("ssl_ae.") in known:
            found.add(name.removeprefix("ssl_ae."))
    # `from package import module` names the package only on the way
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


@pytest.mark.parametrize("module", [name for name in modules() if room(name) != "front"])
def test_a_room_imports_only_from_floors_below(module: str) -> None:
    own = room(module)
    assert own in LEVEL, f"{module} has no floor: give room {own!r} a place in FLOORS"
    for other in inner_imports(modules()[module]):
        if room(other) not in (own, "front"):
            assert LEVEL[room(other)] < LEVEL[own], f"{module} (floor {LEVEL[own]}) imports {other} (floor {LEVEL[room(other)]})"


def test_no_file_imports_itself_through_others() -> None:
    graph = {name: inner_imports(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                if other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", OWNERS)
def test_a_third_party_package_has_one_owner(package: str) -> None:
    users = {
        room(name)
        for name, path in modules().items()
        if any(found == package or found.startswith(f"{package}.") for found in imports(path))
    }
    assert users <= OWNERS[package], f"{package} is also imported by {users - OWNERS[package]}"


def test_the_engine_imports_nothing_from_plugins() -> None:
    for path in modules().values():
        assert not any(found.split(".")[0] == "ssl_ae_builtins" for found in imports(path)), path


@pytest.mark.parametrize(
    "path", [*modules().values(), *sorted((ROOT / "plugins").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_are_short_and_rooms_have_names(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
    assert path.stem not in FORBIDDEN_ROOMS


def test_the_engine_names_no_technique() -> None:
    """Names of encoders, decoders and regularizers are the plugins' own; words of the algebra and of plain English are shared."""
    from ssl_ae.registry import Registry

    entries = Registry.discover().entries
    names = {entry.cls.name for entry in entries if entry.kind in ("encoder", "decoder", "regularizer")}
    shared = {"linear", "weights", "stack"}  # a straight line, what a network learns, and what contextlib leaves in order
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        exact = (names - shared) & words
        allowed = {"mlp"} if module == "recipe" else set()  # the recipe's default encoder and decoder
        assert not exact - allowed, f"{module} names {exact}"


def test_no_component_is_asked_what_it_is() -> None:
    """Components declare (needs, over, tasks); nobody asks with hasattr, isinstance or `if name ==`."""
    asked = re.compile(r"hasattr\(|isinstance\([^)]*\b(Encoder|Decoder|Regularizer|Head|TableHead)\b|\.name == [\"']")
    for module, path in modules().items():
        if room(module) == "testing":
            continue  # the contract kit judges strangers' classes before anything is declared
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            found = asked.search(line)
            assert found is None or "self.name ==" in line, f"{path}:{number}: {line.strip()}"


def test_stage_functions_fit_a_screen() -> None:
    for path in sorted((ENGINE / "stages").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}: {node.name}"
