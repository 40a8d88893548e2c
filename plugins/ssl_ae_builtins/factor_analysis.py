"""Factor analysis and probabilistic PCA: a linear Gaussian decoder, and its posterior in closed form as encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

import ssl_ae
from ssl_ae.latent import Posterior
from ssl_ae_builtins.penalties import Kl


class FactorAnalysisDecoder(ssl_ae.Decoder):
    """p(x|z) = N(W z + b, Psi), Psi diagonal (Bishop 2006, eq. 12.64); Psi = s^2 I is probabilistic PCA (Tipping & Bishop 1999).

    With z ~ N(0, I) the marginal is p(x) = N(b, W W' + Psi). The variances are max(floor, exp(r)), r learned. W is determined up
    to a rotation of the code.
    """

    name = "factor_analysis"

    class Config(ssl_ae.Config):
        noise: Literal["feature", "scalar"] = Field(
            "feature", description="Psi: a variance for each number of x (factor analysis), or one for all (probabilistic PCA)"
        )
        floor: float = Field(
            1e-3, gt=0, description="smallest variance in Psi, in squared units of x; numbers that never vary end there"
        )

    def __init__(self, config: Config, shapes: ssl_ae.Shapes) -> None:
        super().__init__(config, shapes)
        size = math.prod(shapes.x)
        self.linear = nn.Linear(shapes.latent, size)  # W (D, K) and b (D,)
        self.log_noise = nn.Parameter(torch.zeros(size if config.noise == "feature" else 1))  # r

    def noise(self) -> Tensor:
        """The diagonal of Psi, (D,), in float32 at least."""
        variance = self.log_noise.to(torch.promote_types(self.log_noise.dtype, torch.float32)).exp()
        # in value max(floor, exp(r)), in gradient exp(r): a variance that fell below the floor can rise again
        return (variance + (self.config.floor - variance).detach().relu()).expand(self.linear.out_features)

    def forward(self, z: Tensor, run: ssl_ae.Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> N(W z + b, Psi) over (B, *shapes.x); in float32 at least: with small Psi, rounding x costs nats."""
        std = self.noise().sqrt().view(self.shapes.x)
        with torch.autocast(z.device.type, enabled=False):
            mean = self.linear(z.to(self.linear.weight.dtype)).unflatten(1, self.shapes.x)
        return Independent(Normal(mean.to(std.dtype), std, validate_args=False), std.dim(), validate_args=False), {}

    def pictures(self, trace: ssl_ae.Trace) -> Iterable[ssl_ae.Tiles | ssl_ae.Lines]:
        """W turned to its principal axes, and Psi."""
        axes, sizes, _ = torch.linalg.svd(self.linear.weight.detach().float().cpu(), full_matrices=False)
        loadings = (axes * sizes).T.unflatten(1, self.shapes.x)
        yield ssl_ae.Tiles("loadings", "Loadings: the columns of W, turned to its principal axes, largest first", loadings)
        noise = self.noise().detach().cpu()
        if self.config.noise == "feature":
            tiles = noise.view(1, *self.shapes.x)
            yield ssl_ae.Tiles("noise", "Noise variances: what the factors leave unexplained", tiles, signed=False)
        else:
            lines = {"of W W' + Psi": sizes.square() + noise[0], "of Psi": noise[:1].expand(len(sizes))}
            title = "Variances of the model along its principal axes, over those of the noise"
            yield ssl_ae.Lines("variances", title, lines, "principal axis", "variance, in squared units of x", log=True)


class FactorAnalysisEncoder(ssl_ae.Encoder):
    """q(z|x) = p(z|x) = N(V W'Psi^-1 (x - b), V), V = (I + W'Psi^-1 W)^-1 (Bishop 2006, eq. 12.66-68); W, b, Psi: the decoder's.

    The encoder has no parameters. q is exact, so l_X + kl is -log N(x; b, W W' + Psi) in expectation and in gradient: the ELBO is
    tight, and maximising it is maximum likelihood.
    """

    name = "factor_analysis"
    reads_decoder = True

    def forward(self, x: Tensor, run: ssl_ae.Pass) -> MultivariateNormal:
        """x (B, *shapes.x) -> q(z|x), (B, K); in float32 at least, whatever autocast says. V is the same for every row."""
        noise, linear = run.decoder.noise(), run.decoder.linear
        with torch.autocast(x.device.type, enabled=False):
            weight = linear.weight.to(noise.dtype)  # (D, K)
            scaled = weight / noise.sqrt()[:, None]
            scale_tril = inverse_scale_tril(torch.eye(weight.shape[1], dtype=noise.dtype, device=x.device) + scaled.T @ scaled)
            score = ((x.flatten(1).to(noise.dtype) - linear.bias) / noise) @ weight  # (B, K)
            return MultivariateNormal(score @ scale_tril @ scale_tril.T, scale_tril=scale_tril, validate_args=False)

    @classmethod
    def posterior(cls, config: ssl_ae.Config) -> Posterior:
        return "full"

    @classmethod
    def check(cls, config: ssl_ae.Config, recipe) -> list[str]:
        complaints, decoder = [], recipe.decoder
        if not issubclass(decoder.cls, FactorAnalysisDecoder):
            complaints.append(
                f"model.decoder.name = {decoder.full_name}: the encoder factor_analysis is the posterior of the decoder "
                "factor_analysis. Set model.decoder: {name: factor_analysis}."
            )
        weight = sum(part.weight for part in recipe.regularizers if issubclass(part.cls, Kl))
        if not math.isclose(weight, 1.0):
            complaints.append(
                f"model.regularizers: the weight of kl is {weight:g} in all: factor_analysis maximises log p(x) = -(l_X + kl). "
                "Give the recipe {name: kl} once, with weight 1."
            )
        return complaints


def inverse_scale_tril(precision: Tensor) -> Tensor:
    """Lower-triangular C with C C' = P^-1 from P (K, K), without forming the inverse; NaN where P is not positive definite.

    P = U U' with upper-triangular U, which is the Cholesky factor of P with rows and columns reversed; C = U'^-1. The eigenvalues
    of I + A'A are at least 1, so that P fails only where the largest exceeds 1 / rounding (1e7 in float32).
    """
    # not `cholesky`, which waits for the device to raise: a step that is not finite is skipped and counted
    factor, failed = torch.linalg.cholesky_ex(precision.flip(0, 1))
    lower = factor.flip(0, 1).T
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False)
    return torch.where(failed == 0, inverse, torch.nan)
