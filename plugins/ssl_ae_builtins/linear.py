"""The linear autoencoder (Baldi & Hornik 1989): with a unit-variance gaussian it spans the subspace of PCA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae_builtins import jacobians
from ssl_ae_builtins.outputs import OutputConfig, OutputDecoder


class LinearEncoder(ssl_ae.Encoder):
    """z = V x + b: a linear map of the sample (Baldi & Hornik 1989)."""

    name = "linear"

    class Config(ssl_ae.Config):
        bias: bool = Field(True, description="add b; without it the data should be centred")
        posterior: Posterior = Field("point", description="q(z|x): point, diag or full covariance")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.latent = ssl_ae.Latent(math.prod(shapes.x), shapes.latent, config.posterior, bias=config.bias)

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), (B, K)."""
        return self.latent(x.flatten(1))

    def squared_jacobian(self, layers: Mapping[str, Tensor]) -> Tensor:
        """|V|_F^2, the same in every row, (B,)."""
        return jacobians.of_chain([(self.latent.mean_weight, "identity", layers["code"])])

    @classmethod
    def posterior(cls, config: Config) -> Posterior:
        return config.posterior


class LinearDecoder(OutputDecoder):
    """raw = W z + b: a linear map of the code, whose columns are the components (Baldi & Hornik 1989)."""

    name = "linear"

    class Config(OutputConfig):
        bias: bool = Field(True, description="add b, which learns the mean of the data")

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        self.output = config.build(shapes.x)
        self.linear = nn.Linear(shapes.latent, self.output.parameters_per_value * math.prod(shapes.x), bias=config.bias)

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z) over (B, *shapes.x)."""
        raw = self.linear(z).unflatten(1, (self.output.parameters_per_value, *self.shapes.x))
        return self.output(raw), {}

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles]:
        """What each number of the code adds to a sample; nothing where the output is many logits for each number of x."""
        if self.config.likelihood != "categorical":
            columns = self.linear.weight.T.unflatten(1, (self.output.parameters_per_value, *self.shapes.x))
            title = "Components: the columns of W, what a unit of each number of the code adds"
            yield ssl_ae.Tiles("components", title, columns[:, 0])
