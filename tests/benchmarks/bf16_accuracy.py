"""What bf16 costs: the same VAE pretrained in float32 and in bf16 from the same seeds, judged by a probe on its codes.

    python -m tests.benchmarks.bf16_accuracy --data data/mnist --seeds 10

A pair shares seed, initial weights, order and noise. The probe is multinomial logistic regression on E[z|x] of the train
split, scored on validation. Printed: each pair, and the mean difference with its standard error. The gate: the mean is at least
-0.1 points minus one standard error.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

GATE = -0.1  # points of accuracy


def probed(data: Path, seed: int, precision: str, epochs: int) -> float:
    """Validation accuracy in %."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression

    from ssl_ae import recipe as recipes
    from ssl_ae.data.dataset import DataSet
    from ssl_ae.data.loading import Feed, Scaling
    from ssl_ae.model import build, frozen
    from ssl_ae.plan import pretraining
    from ssl_ae.registry import Registry
    from ssl_ae.resolve import resolve
    from ssl_ae.stages.workspace import no_denormals
    from ssl_ae.training import Trainer
    from tests.benchmarks.rows.vae_step import MODEL

    found, cpu = DataSet.open(data), torch.device("cpu")
    tree = {"name": "probe", "data": {"path": str(data)}, "model": MODEL, "pretrain": {"epochs": epochs, "batch_size": 128}}
    resolved = resolve(recipes.parse(tree), Registry.discover(), found.card)
    torch.manual_seed(seed)
    model = build(resolved, head=False)
    scaling = Scaling(found.card.x, resolved.scale)
    feeds = {split: Feed(found.split(split), found.labels(split), scaling, seed=seed, device=cpu) for split in ("train", "val")}
    plan = pretraining(resolved, model, feeds["train"].split.rows)
    with no_denormals():
        Trainer(model, plan, feeds["train"], resolved.recipe.pretrain, seed=seed, device=cpu, bf16=precision == "bf16").run()
    with frozen(model), torch.no_grad():
        codes = {
            split: [(model.features(b.x).numpy(), b.y.numpy()) for b in feed.in_order(4096)] for split, feed in feeds.items()
        }
    (x, y), (x_val, y_val) = ([np.concatenate(part) for part in zip(*codes[split], strict=True)] for split in ("train", "val"))
    mean, std = x.mean(0), x.std(0)
    probe = LogisticRegression(max_iter=300).fit((x - mean) / std, y)
    return 100 * probe.score((x_val - mean) / std, y_val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mnist"), help="packed by `ssl-ae data pack`")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    from tests.benchmarks import kit

    kit.pin()
    differences = []
    for seed in range(given.seeds):
        fp32, bf16 = (probed(given.data, seed, precision, given.epochs) for precision in ("fp32", "bf16"))
        differences.append(bf16 - fp32)
        print(f"seed {seed}: fp32 {fp32:.2f} %, bf16 {bf16:.2f} %, difference {differences[-1]:+.2f}", flush=True)
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    verdict = "passed" if mean >= GATE - error else "NOT passed"
    print(f"mean difference {mean:+.3f} ± {error:.3f} points over {given.seeds} seeds: gate {verdict}")


if __name__ == "__main__":
    main()
