"""How much the codes of a variational autoencoder say about the digit: heads fitted with all labels, on its codes and on PCA's.

    python -m tests.benchmarks.mnist_codes

Same K, same heads, same 54,000 labels; test accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.decomposition import PCA

from tests.benchmarks.linear_pca import flat

HEADS = ("knn", "logistic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("pipelines/mnist_vae.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-vae"))
    given = parser.parse_args()

    from ssl_ae import metrics
    from ssl_ae import recipe as recipes
    from ssl_ae.stages.evaluate import evaluate
    from ssl_ae.stages.finetune import finetune
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    base, rows = recipes.load(given.recipe), []
    for head in HEADS:
        fields = {"data.labels": "all", "model.head": {"name": head}, "finetune.mode": "sequential", "finetune.baselines": False}
        chosen = recipes.with_fields(base, fields)
        with open_workspace(chosen, given.out, str(given.recipe)) as ws:
            pretrain(ws)
            method = finetune(ws).more["method"]
            ours = evaluate(ws, "test", method).metrics["accuracy"]
            pca = PCA(ws.recipe.model.latent_dim, svd_solver="covariance_eigh").fit(flat(ws, "train"))
            codes = {split: torch.from_numpy(pca.transform(flat(ws, split))).float() for split in ("train", "test")}
            on_pca = ws.resolved.head.build(ws.resolved.shapes)
            on_pca.fit(codes["train"], torch.from_numpy(ws.data.labels("train")))
            theirs = metrics.classification(on_pca.predict(codes["test"]).probs.numpy(), ws.data.labels("test"))["accuracy"]
        rows.append(f"| {head} | {100 * ours:.2f} | {100 * theirs:.2f} |")
    print("\n".join(["| head, all labels | VAE codes | PCA codes |", "|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
