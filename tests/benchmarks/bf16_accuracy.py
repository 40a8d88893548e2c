"""What bf16 costs: the same VAE pretrained in float32 and in bf16 from the same seeds, judged by a probe on its codes.

    python -m tests.benchmarks.bf16_accuracy --data data/mnist --seeds 10        about 6 minutes on one core

A pair shares seed, initial weights, order and noise. The probe is multinomial logistic regression on E[z|x] of the train
split, scored on validation; the test split is not read. Printed: each pair, and the mean difference with its standard error.
The gate: the mean is at least -0.1 points minus one standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import kit

GATE = -0.1  # points of accuracy

Probed = Callable[[int, bool], float]  # seed, bf16 -> validation accuracy in %


def probe(data: Path, epochs: int) -> Probed:
    """What trains a VAE from a seed on packed data, and judges its codes."""
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
    scaling = Scaling(found.card.x, resolved.scale)

    def feed(split: str, seed: int = 0) -> Feed:
        return Feed(found.split(split), found.labels(split), scaling, seed=seed, device=cpu)

    def codes(model: torch.nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(N, K) and (N,). In float32 whatever the training was, as `ssl-ae extract` does it."""
        with frozen(model), torch.no_grad():
            parts = [(model.features(batch.x).numpy(), batch.y.numpy()) for batch in feed(split).in_order(4096)]
        x, y = zip(*parts, strict=True)
        return np.concatenate(x), np.concatenate(y)

    def probed(seed: int, bf16: bool) -> float:
        torch.manual_seed(seed)
        model, train = build(resolved, head=False), feed("train", seed)
        plan = pretraining(resolved, model, train.split.rows)
        with no_denormals():
            Trainer(model, plan, train, resolved.recipe.pretrain, seed=seed, device=cpu, bf16=bf16).run()
        (x, y), (x_val, y_val) = codes(model, "train"), codes(model, "val")
        mean, std = x.mean(0), x.std(0)
        fitted = LogisticRegression(max_iter=300).fit((x - mean) / std, y)
        return 100 * fitted.score((x_val - mean) / std, y_val)

    return probed


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """And its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mnist"), help="packed by `ssl-ae data pack`")
    parser.add_argument("--seeds", type=int, default=10, help="pairs, at least 2")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    kit.pin()
    if reason := kit.why_no_bf16():
        print(f"skipped: {reason}")
        return
    if not (given.data / "card.json").exists():
        sys.exit(f"{given.data} holds no packed data. Make it: ssl-ae data pack FOLDER_WITH_THE_IDX_FILES {given.data}")
    probed = probe(given.data, given.epochs)
    found: dict[str, list[float]] = {"fp32": [], "bf16": [], "difference": []}
    print("| seed | fp32, % | bf16, % | difference, points |\n|---|---|---|---|")
    for seed in range(max(2, given.seeds)):
        fp32, bf16 = probed(seed, False), probed(seed, True)
        for values, value in zip(found.values(), (fp32, bf16, bf16 - fp32), strict=True):
            values.append(value)
        print(f"| {seed} | {fp32:.2f} | {bf16:.2f} | {bf16 - fp32:+.2f} |", flush=True)
    cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in map(mean_and_error, found.values())]
    print(f"| mean ± standard error | {' | '.join(cells)} |")
    mean, error = mean_and_error(found["difference"])
    print(f"gate, mean >= {GATE} - {error:.2f}: {'met' if mean >= GATE - error else 'NOT met'}")


if __name__ == "__main__":
    main()
