"""Plugins as other people install them: small real distributions with an entry point, in a folder on sys.path."""

import textwrap
from pathlib import Path

ENCODER = '''
import ssl_ae
from ssl_ae.testing.companions import PlainEncoder

class {cls}(PlainEncoder):
    """Codes of {name}."""
    name = "{name}"

@ssl_ae.hookimpl
def ssl_ae_encoders():
    return [{cls}]
'''


def encoder(name: str) -> str:
    """The module of a plugin with one encoder."""
    return ENCODER.format(name=name, cls=name.title())


def put(folder: Path, distribution: str, source: str, entry_point: str | None = None, version: str = "1.2") -> str:
    """What pip leaves in site-packages: a module and its metadata. Returns the module's name."""
    module = f"fake_{distribution.replace('-', '_')}"
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[ssl_ae]\n{entry_point or distribution} = {module}\n")
    return module
