"""A linear Gaussian model whose log p(x), posterior and bounds have closed forms, as an engine's model and in numpy."""

import numpy as np
import torch
from engine_kit import fresh, resolved
from scipy import stats

from ssl_ae.latent import SMALLEST_SCALE
from ssl_ae.likelihood import SMALLEST_STD

B, D, K = 11, 7, 2


class Linear:
    """p(x|z) = N(W z + b, Psi), q(z|x) = N(m(x), L L'), both linear in their arguments, by numpy beside the engine's model."""

    def __init__(self, q, seed=0):
        random = np.random.default_rng(seed)
        self.w, self.b, std = random.normal(size=(D, K)), random.normal(size=D), random.uniform(0.5, 1.5, D)
        self.psi = np.diag(std**2)
        self.x = random.normal(size=(B, K)) @ self.w.T + self.b + random.normal(size=(B, D)) * std
        precision = np.eye(K) + self.w.T @ np.linalg.inv(self.psi) @ self.w
        self.exact = np.linalg.inv(precision)  # the posterior's covariance V; its mean is V W' Psi^-1 (x - b)
        self.v = self.exact @ self.w.T @ np.linalg.inv(self.psi)
        self.scale = np.linalg.cholesky(self.exact)
        if q == "inexact":
            self.v, self.scale = 0.8 * self.v, 1.4 * self.scale + np.tril(np.full((K, K), 0.2), -1)
        elif q == "prior":
            self.v, self.scale = 0 * self.v, np.eye(K)
        self.model = self._model(std)
        self.rows = torch.from_numpy(self.x)

    def _model(self, std):
        encoder = {"name": "linear", "posterior": "full"}
        decoder = {"name": "linear", "variance": "feature"}
        model = fresh(resolved((D,), model={"latent_dim": K, "encoder": encoder, "decoder": decoder}))
        latent, below = model.encoder.latent.linear, np.tril_indices(K, -1)
        raw = [np.log(np.expm1(np.diag(self.scale) - SMALLEST_SCALE)), self.scale[below]]
        with torch.no_grad():
            latent.weight.zero_()
            latent.weight[:K] = torch.from_numpy(self.v)
            latent.bias.copy_(torch.from_numpy(np.concatenate([-self.v @ self.b, *raw])))
            model.decoder.linear.weight.copy_(torch.from_numpy(self.w))
            model.decoder.linear.bias.copy_(torch.from_numpy(self.b))
            model.decoder.output.raw_std.copy_(torch.from_numpy(np.log(np.expm1(std - SMALLEST_STD))))
        return model

    def log_p(self):
        """(B,) log N(x; b, W W' + Psi)."""
        return stats.multivariate_normal(self.b, self.w @ self.w.T + self.psi).logpdf(self.x)

    def means(self):
        """(B, K) of q."""
        return (self.x - self.b) @ self.v.T
