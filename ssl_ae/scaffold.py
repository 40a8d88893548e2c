"""`ssl-ae plugins new`: a package that installs, works and passes its contract, to be changed into one's own."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from string import Template

from ssl_ae import files
from ssl_ae.errors import PluginError
from ssl_ae.registry import Registry
from ssl_ae.scaffold_modules import MODULES

LONGEST = 60  # characters of a name
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")

PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "ssl-ae-$name"
version = "0.1.0"
description = "$kind for ssl-ae."
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
dependencies = ["ssl-ae>=0.1", "torch>=2.9", "pydantic>=2.11"]

[project.optional-dependencies]
test = ["pytest>=8.4"]

[project.entry-points.ssl_ae]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
""")

TEST = Template("""\
import ssl_ae

from $module import $cls

test_contract = ssl_ae.testing.contract($cls)
""")

README = Template("""\
# ssl-ae-$name

A plugin of ssl-ae that adds the $kind `$name`.

    pip install -e .
    ssl-ae plugins show $name
    ssl-ae plugins check $name
    pytest

In a recipe:

```yaml
model:
$recipe
```

What it computes is in `$module.py`: change the formula, the options and the docstring, which
`ssl-ae plugins show $name` prints. Raise `version` in the class when stored weights change their meaning.
""")

RECIPES = {
    "encoder": Template("  encoder: {name: $name}"),
    "decoder": Template("  decoder: {name: $name}"),
    "regularizer": Template("  regularizers: [{name: $name, weight: 0.1}]"),
    "head": Template("  head: {name: $name}"),
    "table-head": Template("  head: {name: $name}             # finetune --sequential"),
}


def write_package(name: str, kind: str, parent: Path, registry: Registry) -> Path:
    """Write `parent/ssl-ae-NAME`, whole or not at all, and return it.

    Raises PluginError for an illegal name, a name that an installed plugin has, and a folder that exists.
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise PluginError(
            f"NAME = {name[: 2 * LONGEST]!r}: expected lower-case letters and digits, a letter first, single _ or - between, "
            f"as in top_k, {LONGEST} at most."
        )
    if name in registry.plugins:
        raise PluginError(f"NAME = {name!r}: {registry.plugins[name].origin} is installed under this name. Choose another.")
    folder = parent.expanduser() / f"ssl-ae-{name}"
    if folder.exists():
        raise PluginError(f"{folder} exists. Choose another NAME, or another place with --out.")
    module = f"ssl_ae_{name.replace('-', '_')}"
    cls = "".join(part.capitalize() for part in re.split("[_-]", f"{name}-{kind}"))
    words = {"name": name, "kind": kind, "module": module, "cls": cls}
    texts = {
        "pyproject.toml": PYPROJECT.substitute(words),
        "README.md": README.substitute(words, recipe=RECIPES[kind].substitute(words)),
        f"{module}.py": Template(MODULES[kind]).substitute(words),
        "tests/test_contract.py": TEST.substitute(words),
    }
    aside = files.make_folder(folder.parent) / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    try:
        for path, text in texts.items():
            files.write_text(aside / path, text)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
