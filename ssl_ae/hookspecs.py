"""The five hooks of a plugin. Each takes nothing, returns classes and has no side effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from ssl_ae.components import Decoder, Encoder, Head, Regularizer, TableHead
    from ssl_ae.data.sources import Source

hookspec = HookspecMarker("ssl_ae")
hookimpl = HookimplMarker("ssl_ae")


@hookspec
def ssl_ae_encoders() -> list[type[Encoder]]:
    """Classes that turn a sample into q(z|x)."""


@hookspec
def ssl_ae_decoders() -> list[type[Decoder]]:
    """Classes that turn a code into p(x|z)."""


@hookspec
def ssl_ae_regularizers() -> list[type[Regularizer]]:
    """Classes that corrupt, penalise or constrain."""


@hookspec
def ssl_ae_heads() -> list[type[Head] | type[TableHead]]:
    """Classes that turn a code into p(y|z)."""


@hookspec
def ssl_ae_sources() -> list[type[Source]]:
    """Classes that read somebody's files for `ssl-ae data pack`."""
