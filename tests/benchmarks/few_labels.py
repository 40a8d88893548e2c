"""What each mode makes of few labels: one pretrained autoencoder, several draws of labels, scored on test.

    make few-labels

One row a method: test accuracy, mean ± standard deviation over label seeds, beside the same labels without unlabelled data.
Every cell is a run folder of its own under --out, so an interrupted table goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

METHODS = {
    "sequential, softmax head": {"finetune.mode": "sequential"},
    "sequential, logistic table head": {"finetune.mode": "sequential", "model.head.name": "logistic"},
    "joint, alpha 0.001": {"finetune.mode": "joint", "finetune.alpha": 0.001},
    "joint, alpha 0.01": {"finetune.mode": "joint", "finetune.alpha": 0.01},
    "joint, alpha 0.1": {"finetune.mode": "joint", "finetune.alpha": 0.1},
    "joint, alpha 0.01, without the KL term": {
        "finetune.mode": "joint",
        "finetune.alpha": 0.01,
        "model.regularizers": [],
        "finetune.baselines": False,
    },
    "alternating": {"finetune.mode": "alternate"},
    "end-to-end": {"finetune.mode": "end-to-end"},
}


def cell(recipe_path: Path, out: Path, total: int, seed: int, epochs: int) -> dict[str, float]:
    """{method: test accuracy} for one draw of labels."""
    os.environ.setdefault("SSL_AE_TRACKING", "journal")  # `ssl-ae track sync` can deliver the runs later
    import torch

    from ssl_ae import recipe as recipes
    from ssl_ae.progress import Reporter
    from ssl_ae.stages.evaluate import evaluate
    from ssl_ae.stages.finetune import finetune
    from ssl_ae.stages.workspace import open_workspace

    torch.set_num_threads(1)
    base, folder = recipes.load(recipe_path), out / f"labels-{total}-seed-{seed}"
    labels = {"data.labels": {"total": total, "seed": seed}, "finetune.epochs": epochs}
    made = {}
    for name, fields in METHODS.items():
        chosen = recipes.with_fields(base, labels | fields)
        with open_workspace(chosen, folder, str(recipe_path), Reporter(silent=True)) as ws:
            made[finetune(ws, pretrained=out / "pretrained").more["method"]] = name
    with open_workspace(chosen, folder, str(recipe_path), Reporter(silent=True)) as ws:
        found = evaluate(ws, "test", next(iter(made))).more  # whose baselines are those of this model and these labels
    print(f"{total} labels, seed {seed}: done", flush=True)
    accuracy = {made[folder]: scores["accuracy"] for folder, scores in found["methods"].items()}
    baselines = {f"{name} (no unlabelled data)": scores["accuracy"] for name, scores in found["baselines"].items()}
    return {name: accuracy[name] for name in METHODS} | baselines


def table(cells: dict[int, list[dict[str, float]]]) -> str:
    """Markdown: a row a method, a column a number of labels."""
    methods = list(dict.fromkeys(name for found in cells.values() for name in found[0]))
    lines = ["| method | " + " | ".join(f"{total} labels" for total in cells) + " |", "|---|" + "---|" * len(cells)]
    for method in methods:
        columns = []
        for found in cells.values():
            values = [100 * scores[method] for scores in found]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            columns.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        lines.append(f"| {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("pipelines/mnist_vae.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/few-labels"))
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="passes of finetuning: equal steps in every mode")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()

    from ssl_ae import recipe as recipes
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    with open_workspace(recipes.load(given.recipe), given.out / "pretrained", str(given.recipe)) as ws:
        pretrain(ws)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        waiting = {
            total: [pool.submit(cell, given.recipe, given.out, total, seed, given.epochs) for seed in range(given.seeds)]
            for total in given.labels
        }
        cells = {total: [future.result() for future in futures] for total, futures in waiting.items()}
    text = table(cells)
    (given.out / "table.md").write_text(text + "\n")
    print(f"test accuracy in %, mean ± sd over {given.seeds} label seeds\n\n{text}")


if __name__ == "__main__":
    main()
