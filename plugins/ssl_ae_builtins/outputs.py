"""The options every decoder has about p(x|z)."""

from __future__ import annotations

from pydantic import Field

import ssl_ae
from ssl_ae.likelihood import Likelihood, Name, Variance


class OutputConfig(ssl_ae.Config):
    likelihood: Name = Field(
        "gaussian", description="p(x|z): gaussian, bernoulli (x in [0, 1]) or categorical (levels of [0, 1])"
    )
    variance: Variance = Field(
        "unit", description="of gaussian: unit, or learned as one scalar, one a feature, or given by the decoder"
    )
    levels: int = Field(256, ge=2, le=256, description="of categorical: equally spaced values of x")

    def build(self, shape: tuple[int, ...]) -> Likelihood:
        return Likelihood(self.likelihood, shape, self.variance, self.levels)


class OutputDecoder(ssl_ae.Decoder):
    """A decoder whose last layer feeds one of the likelihoods."""

    Config = OutputConfig

    @classmethod
    def likelihood(cls, config: OutputConfig) -> str:
        return config.likelihood

    @classmethod
    def check(cls, config: OutputConfig, recipe) -> list[str]:
        if config.likelihood != "gaussian" and config.variance != "unit":
            return [f"model.decoder.variance = {config.variance}: only the gaussian likelihood has a variance. Remove it."]
        return []
