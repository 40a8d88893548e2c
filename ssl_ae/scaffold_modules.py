"""The modules that `ssl-ae plugins new` writes: for each kind a small component that works. $name and $cls are filled in."""

from __future__ import annotations

ENCODER = '''\
"""The encoder $name for ssl-ae."""

from __future__ import annotations

import math

import ssl_ae
from pydantic import Field
from torch import Tensor, nn


class $cls(ssl_ae.Encoder):
    """z = tanh(W2 tanh(W1 x + b1) + b2): codes between -1 and 1 (say here whose idea it is, and the year)."""

    name = "$name"

    class Config(ssl_ae.Config):
        width: int = Field(128, ge=1, description="units of the hidden layer")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.hidden = nn.Linear(math.prod(shapes.x), config.width)
        self.code = nn.Linear(config.width, shapes.latent)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> ssl_ae.Point:
        """x (B, *shapes.x) -> Point, (B, K)."""
        h = run.tap(self.hidden(x.flatten(1)).tanh(), "h1")
        return ssl_ae.Point(self.code(h).tanh())

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        """Complaints about options that cannot work with this recipe: say what was given, what is allowed, the cure."""
        return []


@ssl_ae.hookimpl
def ssl_ae_encoders() -> list[type[ssl_ae.Encoder]]:
    return [$cls]
'''

DECODER = '''\
"""The decoder $name for ssl-ae."""

from __future__ import annotations

import math

import ssl_ae
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution


class $cls(ssl_ae.Decoder):
    """x^ = W2 tanh(W1 z + b1) + b2 under a gaussian with one learned variance (say here whose idea it is, and the year)."""

    name = "$name"

    class Config(ssl_ae.Config):
        width: int = Field(128, ge=1, description="units of the hidden layer")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.hidden = nn.Linear(shapes.latent, config.width)
        self.mean = nn.Linear(config.width, math.prod(shapes.x))
        self.output = ssl_ae.Likelihood("gaussian", shapes.x, variance="scalar")

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, *shapes.x), and no guesses of the encoder's layers."""
        h = run.tap(self.hidden(z).tanh(), "d1")
        return self.output(self.mean(h).unflatten(1, (1, *self.shapes.x))), {}


@ssl_ae.hookimpl
def ssl_ae_decoders() -> list[type[ssl_ae.Decoder]]:
    return [$cls]
'''

REGULARIZER = '''\
"""The regularizer $name for ssl-ae."""

from __future__ import annotations

import ssl_ae
import torch
from pydantic import Field
from torch import Tensor


class $cls(ssl_ae.Regularizer):
    """sum_j log(1 + (h_j / scale)^2) per row: few active units, with a lighter hand on large ones than |h| (say whose idea)."""

    name = "$name"
    over = ssl_ae.Over.ROWS
    layers = ("code",)

    class Config(ssl_ae.Config):
        scale: float = Field(1.0, gt=0, description="activation above which the penalty flattens, in units of the layer")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,), unweighted: the recipe's `weight` multiplies it."""
        layers = [h.flatten(1) / self.config.scale for h in trace.layers(self.layers)]
        return torch.stack([h.square().log1p().sum(1) for h in layers]).sum(0)


@ssl_ae.hookimpl
def ssl_ae_regularizers() -> list[type[ssl_ae.Regularizer]]:
    return [$cls]
'''

HEAD = '''\
"""The head $name for ssl-ae."""

from __future__ import annotations

import ssl_ae
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution


class $cls(ssl_ae.Head):
    """p(y|z) = softmax(s * cos(z, w_y)): classes by direction, not by length (say here whose idea it is, and the year)."""

    name = "$name"
    tasks = frozenset({"classes"})

    class Config(ssl_ae.Config):
        scale: float = Field(10.0, gt=0, description="s, how sharply the cosine decides")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.directions = nn.Linear(shapes.latent, shapes.outputs, bias=False)

    def forward(self, features: Tensor) -> Distribution:
        """(B, K) -> Categorical over classes, (B,)."""
        z = nn.functional.normalize(features.float(), dim=1)
        w = nn.functional.normalize(self.directions.weight.float(), dim=1)
        return Categorical(logits=self.config.scale * z @ w.T, validate_args=False)


@ssl_ae.hookimpl
def ssl_ae_heads() -> list[type[ssl_ae.Head]]:
    return [$cls]
'''

TABLE_HEAD = '''\
"""The table head $name for ssl-ae."""

from __future__ import annotations

import ssl_ae
import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Categorical, Distribution


class $cls(ssl_ae.TableHead):
    """p(y|z) = softmax(-|z - m_y|^2 / (2 T)): the nearest class mean m_y (say here whose idea it is, and the year)."""

    name = "$name"
    tasks = frozenset({"classes"})

    class Config(ssl_ae.Config):
        temperature: float = Field(1.0, gt=0, description="T, in squared units of the latents; higher is less certain")

    def fit(self, z: Tensor, y: Tensor) -> None:
        """z (N, K), y (N,) with UNLABELED = -1; a class without a label gets probability 0."""
        classes = torch.arange(self.shapes.classes)
        member = (y == classes[:, None]).to(z.dtype)  # (C, N)
        self.keep("means", member @ z / member.sum(1, keepdim=True).clamp_min(1))
        self.keep("seen", member.any(1))

    def predict(self, z: Tensor) -> Distribution:
        """(B, K) -> Categorical, (B,)."""
        squares = (z[:, None] - self.means).square().sum(2)
        logits = (-squares / (2 * self.config.temperature)).where(self.seen, -torch.inf)
        return Categorical(logits=logits, validate_args=False)


@ssl_ae.hookimpl
def ssl_ae_heads() -> list[type[ssl_ae.TableHead]]:
    return [$cls]
'''

MODULES = {"encoder": ENCODER, "decoder": DECODER, "regularizer": REGULARIZER, "head": HEAD, "table-head": TABLE_HEAD}
