"""The linear autoencoder against scikit-learn's PCA of the same K on MNIST's test set: mean squared error and subspace.

python -m tests.benchmarks.linear_pca
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("pipelines/mnist_linear.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-linear"))
    given = parser.parse_args()

    from ssl_ae import recipe as recipes
    from ssl_ae.model import frozen
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    with open_workspace(recipes.load(given.recipe), given.out, str(given.recipe)) as ws:
        pretrain(ws)
        model = ws.load_pretrained(ws.fresh_model(head=False))
        train, test = (flat(ws, split) for split in ("train", "test"))
        with frozen(model), torch.no_grad():
            x = torch.from_numpy(test).view(-1, *ws.card.x.shape)
            ours = float((model.decode(model.features(x)).mean - x).square().mean())
        pca = PCA(ws.recipe.model.latent_dim, svd_solver="covariance_eigh").fit(train)
        theirs = float(np.mean((pca.inverse_transform(pca.transform(test)) - test) ** 2))
        columns = model.decoder.linear.weight.detach().numpy()
        angles = np.degrees(subspace_angles(columns, pca.components_.T))
    print(f"test mse: linear autoencoder {ours:.6f}, PCA {theirs:.6f}, ratio {ours / theirs:.4f}")
    print(f"angles between the subspaces: largest {angles.max():.2f} degrees, median {np.median(angles):.2f}")


def flat(ws, split: str) -> np.ndarray:
    rows = ws.data.split(split)
    return ws.scaling(torch.from_numpy(rows.read(np.arange(rows.rows)))).flatten(1).numpy()


if __name__ == "__main__":
    main()
