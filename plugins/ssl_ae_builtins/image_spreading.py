"""Labels that spread over a graph of latents whose neighbours get a second look: by how far apart their images are."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_ae_builtins.image_distance import distances
from ssl_ae_builtins.images import complaints, pixel_scale
from ssl_ae_builtins.label_graph import GRAPHS, NEAR, graph_of, joined, mean, nearest_others, powered, symmetric
from ssl_ae_builtins.label_spreading import Graphs, LabelSpreading, Setting


class ImageLabelSpreading(LabelSpreading):
    """`label_spreading` whose neighbours get a second look, by the image distortion model (Keysers et al. 2007).

    Of the `candidates` nearest latents the k nearest images are joined, by exp(-d^2 / 2 s^2)^power: d is the model's distance,
    which forgives what a small bend explains, and s^2 the median over the rows of that of the k-th. Labels travel over the mean
    of this graph and another of the same rows (`beside`), which bridges what neither sees as near; `sharpen` moves the borders
    between classes on this graph alone. A prediction asks the latents only. While it is fitted, memory holds the train samples
    and about 7 numbers for each of their pixels, 4 bytes each.
    """

    name = "image_label_spreading"

    class Config(LabelSpreading.Config):
        beside: Literal["latents", "samples"] = Field(
            "latents",
            description="the other graph: latents, as of label_spreading; samples: of their principal components, as many as "
            "latents, which no network has bent",
        )
        candidates: int = Field(20, ge=1, description="nearest latents that get a second look")
        window: int = Field(2, ge=0, description="how far a pixel may look for its like, in pixels along each axis")
        side: int | None = Field(
            None,
            ge=1,
            description="pixels along the shorter side of the images that `window` is meant for: on others the same relative "
            "reach, 1 at least where it is not 0; default: the images' own",
        )

    @classmethod
    def reads_all_samples(cls, config: Config) -> bool:
        return True

    def graphs(self, z: Tensor, setting: Setting, *x: Tensor) -> Graphs:
        asked = (*setting[:2], self.config.power, self._candidates(), self.config.beside, self._window())
        return GRAPHS(lambda: self._looked_again(z, setting, *x), [z, *x], *asked)

    def _looked_again(self, z: Tensor, setting: Setting, x: Tensor) -> Graphs:
        """Of centred latents z (N, K) and images x (N, D)."""
        metric, k, power, count = setting.metric, setting.k, self.config.power, self._candidates()
        products, near = NEAR(lambda: nearest_others(z, metric, count), [z], metric, count)
        if self.config.beside == "samples":
            wide = z.shape[1]  # of another round's latents, these components are the same
            components = NEAR(lambda: principal(x, wide), [x], "principal", wide)
            other = graph_of(components, metric, k, power, self.reach())
        else:
            other = joined(products[:, :k], near[:, :k], z, metric, power)
        squares, near = NEAR(lambda: self._alike(x, near), [x, near], self._window())
        squares, near = squares[:, :k], near[:, :k]
        scale = squares[:, -1].median().clamp(min=torch.finfo(z.dtype).tiny)
        again = symmetric(powered(torch.exp(-squares / (2 * scale)), power), near)
        return Graphs(mean(again, other), again)

    def _alike(self, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Images x (N, D) and candidates (N, M): squared distances and rows of these, the nearest first."""
        squares, order = distances(x.unflatten(1, self.shapes.x), near, self._window()).sort(dim=1, stable=True)
        return squares, near.gather(1, order)

    def _candidates(self) -> int:
        return max(self.config.candidates, self.reach())

    def _window(self) -> int:
        window = self.config.window
        return max(min(1, window), round(window * pixel_scale(self.shapes.x, self.config.side)))

    @classmethod
    def check(cls, config: Config, recipe) -> list[str]:
        found = super().check(config, recipe) + complaints(cls.name, recipe.shapes.x, "Take label_spreading.")
        if config.k != "auto" and config.k > config.candidates:
            found.append(f"model.head.k = {config.k} of {config.candidates} candidates: raise model.head.candidates.")
        return found


def principal(x: Tensor, count: int) -> Tensor:
    """Samples (N, D) in their directions of the largest variance, (N, count), or as many as there are."""
    from sklearn.decomposition import PCA

    return torch.from_numpy(PCA(min(count, *x.shape), random_state=0).fit_transform(x.cpu().numpy())).to(x)
