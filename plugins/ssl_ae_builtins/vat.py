"""Virtual adversarial training: the prediction shall not change in the direction in which it would change most."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

import ssl_ae

Predict = Callable[[Tensor], Distribution]


class Vat(ssl_ae.Regularizer):
    """KL(p(y|x) || p(y|x + r)), r = argmax of it over |r|_2 <= eps, per row, in nats, (B,) (Miyato et al. 2018, eq. 5 and 6).

    r = eps d, where d comes from a random unit vector by the power iteration d <- normalised gradient of the divergence at
    xi d (their alg. 1): for small xi that is H d, with H the divergence's Hessian at x, so d turns towards its dominant
    eigenvector. |d|_2 = 1 over all numbers of a row. Neither p(y|x) nor r carries a gradient. The mean is over labelled and
    unlabelled rows alike, as in their eq. 7. Predictions are of the undisturbed row with frozen statistics (theirs normalise by
    the batch), computed in float32. For other tasks than classes it is the divergence of that head's distributions.
    """

    name = "vat"
    needs = frozenset({ssl_ae.Need.PREDICTION})

    class Config(ssl_ae.Config):
        eps: float = Field(
            1.0,
            gt=0,
            description="norm of r in the scaled sample: half the distance of near rows, say; larger changes what x shows",
        )
        # the paper's 1e-6 is lost in float32's rounding: on a trained network of digits the cosine of the direction found with
        # the exact one is 0.3, with 0.01 0.94 to 0.998, with 0.1 0.996
        xi: float = Field(0.1, gt=0, description="norm at which the gradient is taken: small, but above float32's rounding")
        iterations: int = Field(1, ge=1, description="of the power method, each a pass forth and back; the paper uses 1")

    def penalty(self, trace: ssl_ae.Trace) -> Tensor:
        """(B,)."""
        x = trace.batch.x.detach()
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round xi d away
            with torch.no_grad():
                p = trace.predict(x)
            return self._divergence(p, trace.predict(x + self.adversary(p, trace.predict, x)))

    def adversary(self, p: Distribution, predict: Predict, x: Tensor) -> Tensor:
        """r, like x (B, *shapes.x), of norm eps in every row; 0 where the divergence is flat."""
        d = unit(torch.randn_like(x))
        for _ in range(self.config.iterations):
            with torch.enable_grad():  # also in validation
                r = (self.config.xi * d).requires_grad_()
                (gradient,) = torch.autograd.grad(self._divergence(p, predict(x + r)).sum(), r)
            d = unit(gradient)
        return self.config.eps * d

    def _divergence(self, p: Distribution, q: Distribution) -> Tensor:
        """KL(p || q), (B,)."""
        if self.shapes.classes is None:
            return kl_divergence(p, q)
        return (p.probs * (p.logits - q.logits)).sum(1)  # torch's own is infinite where a probability is rounded to 0

    @classmethod
    def check(cls, config: Config, recipe) -> Iterator[str]:
        encoder = recipe.encoder
        if not encoder.cls.differentiable:
            yield (
                f"model.encoder.name = {encoder.full_name}: its code carries no gradient to the sample, where vat searches. "
                "Take another encoder, or remove vat."
            )


def unit(d: Tensor) -> Tensor:
    """Each row of d (B, *s) divided by its norm; rows of 0 stay."""
    smallest = torch.finfo(d.dtype).tiny
    flat = d.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(smallest)  # squares of a small gradient would underflow
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(smallest)).view_as(d)
