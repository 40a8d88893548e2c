"""Dictionaries whose atoms cannot grow: without it, a penalty of codes is evaded by small codes and large weights."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

import ssl_ae
from ssl_ae_builtins.linear import LinearDecoder


class UnitNorm(ssl_ae.Regularizer):
    """W_k <- W_k / |W_k|_2, or W_k / max(|W_k|_2, 1), after each step, for each column of a linear decoder (Mairal et al. 2010).

    Their constraint is `at_most` (alg. 2); at a minimum of l_X + lambda |z|_1 the atoms in use lie on its border. A column of
    zeros stays as it is.
    """

    name = "unit_norm"

    class Config(ssl_ae.Config):
        norm: Literal["equal", "at_most"] = Field("equal", description="equal: |W_k| = 1; at_most: |W_k| <= 1")

    def project(self, model: nn.Module) -> None:
        weight = model.decoder.linear.weight  # (D, K): an atom a column
        norm = torch.linalg.vector_norm(weight, dim=0)
        weight.div_(norm.clamp_min(1.0 if self.config.norm == "at_most" else torch.finfo(weight.dtype).tiny))

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        decoder = recipe.decoder
        if decoder.cls is not LinearDecoder:
            return [
                f"model.decoder.name = {decoder.full_name}: unit_norm acts on atoms, the columns of the linear decoder's matrix. "
                "Set model.decoder: {name: linear}, or remove unit_norm."
            ]
        several = "likelihood = categorical" if decoder.config.likelihood == "categorical" else "variance = decoder"
        if decoder.config.build(recipe.shapes.x).parameters_per_value > 1:
            return [
                f"model.decoder.{several}: a column of the decoder's matrix then holds more than the atom. "
                "Take another output, or remove unit_norm."
            ]
        return []
