"""Does `head: auto` do harm? Its accuracy on unseen rows beside logistic regression and a random forest on the raw features.

    make do-no-harm

Every classification data set of scikit-learn's that loads without internet (covertype where it is cached) and three tables of
its generators; 20, 50 and 100 labels, drawn as they come or balanced, ten draws each. One modest autoencoder a data set learns
from all train rows without labels. Regret is how many points of test accuracy `auto` loses to the better of the two on the raw
features, the better by its mean over the ten draws on the very test rows: a rival that nobody could choose in advance.

What is done is kept under --out, so an interrupted table goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ROWS = 3000  # of a made table
MOST_ROWS = 5000  # of covertype's 581,012

Table = tuple[np.ndarray, np.ndarray]  # x (N, D) float32, y (N,) int64


def shipped(name: str) -> Callable[[], Table]:
    def load() -> Table:
        from sklearn import datasets

        return getattr(datasets, f"load_{name}")(return_X_y=True)

    return load


def covertype() -> Table:
    """Raises OSError where scikit-learn has not cached it."""
    from sklearn.datasets import fetch_covtype

    x, y = fetch_covtype(download_if_missing=False, return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))[:MOST_ROWS]
    return x[rows], y[rows] - 1


def imbalanced() -> Table:
    """Three classes of 80, 15 and 5 %; 5 of 20 columns tell them apart."""
    from sklearn.datasets import make_classification

    shares = [0.80, 0.15, 0.05]
    return make_classification(ROWS, 20, n_informative=5, n_redundant=5, n_classes=3, weights=shares, random_state=0)


def moons() -> Table:
    """Two crescents in two columns, and eight columns of noise."""
    from sklearn.datasets import make_moons

    x, y = make_moons(ROWS, noise=0.25, random_state=0)
    return np.concatenate([x, np.random.default_rng(0).normal(size=(ROWS, 8))], axis=1), y


def blobs() -> Table:
    """Six round clusters in 12 columns that overlap a little."""
    from sklearn.datasets import make_blobs

    return make_blobs(ROWS, 12, centers=6, cluster_std=6.0, random_state=0)


TABLES: dict[str, Callable[[], Table]] = {
    **{name: shipped(name) for name in ("digits", "breast_cancer", "wine", "iris")},
    "covertype": covertype,
    "imbalanced": imbalanced,
    "moons": moons,
    "blobs": blobs,
}
MADE = {"imbalanced", "moons", "blobs"}
DRAWS = ("natural", "balanced")


def prepare(name: str, out: Path) -> Path | None:
    """Split, pack, pretrain and encode, once: x, z and y of train and test. None where the data set is not on this machine."""
    stored = out / name / "encoded.npz"
    if stored.exists():
        return stored
    os.environ.setdefault("SSL_AE_TRACKING", "journal")
    import torch
    from sklearn.model_selection import train_test_split

    from ssl_ae import recipe as recipes
    from ssl_ae.progress import Reporter
    from ssl_ae.stages.autoencoder import Autoencoder
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    try:
        x, y = TABLES[name]()
    except OSError:
        return None
    x, y = x.astype(np.float32), y.astype(np.int64)
    share = 2 / 3 if name in MADE else 1 / 3  # a made table can afford many test rows
    splits = dict(
        zip(
            ("x_train", "x_test", "y_train", "y_test"),
            train_test_split(x, y, test_size=share, stratify=y, random_state=0),
            strict=True,
        )
    )
    (out / name).mkdir(parents=True, exist_ok=True)
    np.savez(out / name / "raw.npz", **splits)
    wide = x.shape[1] > 32
    tree = {
        "name": name,
        "device": "cpu",
        "data": {"path": str(out / name / "data"), "source": str(out / name / "raw.npz")},
        "model": {
            "latent_dim": 32 if wide else 8,
            "encoder": {"name": "mlp", "widths": [256, 128] if wide else [64, 32]},
            "decoder": {"name": "mlp"},
            "regularizers": [{"name": "gaussian_noise", "scale": 0.5}],
        },
        "pretrain": {"epochs": 100, "batch_size": 64 if wide else 32},
    }
    torch.set_num_threads(1)
    with open_workspace(recipes.parse(tree), out / name / "run", name, Reporter(silent=True)) as ws:
        pretrain(ws)
    trained = Autoencoder.load(out / name / "run", Reporter(silent=True))
    encoded = {f"y_{split}": splits[f"y_{split}"] for split in ("train", "test")}
    with torch.no_grad():
        for split in ("train", "test"):
            scaled = trained.scaling(torch.from_numpy(splits[f"x_{split}"]))
            encoded |= {f"x_{split}": scaled.numpy(), f"z_{split}": trained.model.features(scaled).numpy()}
    np.savez(stored, **encoded)
    return stored


def draw(y: np.ndarray, count: int, seed: int, how: str) -> np.ndarray:
    """`count` rows in order: any, or as many of each class as there are rows and remainders allow."""
    order = np.random.default_rng([seed, count]).permutation(len(y))
    if how == "balanced":
        turn = np.empty(len(y), dtype=np.int64)  # the how-manieth of its class a row is
        for label in np.unique(y):
            own = order[y[order] == label]
            turn[own] = np.arange(len(own))
        order = order[np.argsort(turn[order], kind="stable")]
    return np.sort(order[:count])


@dataclass(frozen=True)
class Rows:
    """What a network reads of a data set: stored samples (N, D), in the order of the draws."""

    x: np.ndarray

    def split(self, _: str) -> Rows:
        return self

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.x[rows]


def cell(stored: Path, how: str, count: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy in % of the head and of both rivals on one draw of labels."""
    import torch
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from ssl_ae_builtins.auto import NAMES, Auto

    from ssl_ae.progress import Reporter
    from ssl_ae.stages.autoencoder import Autoencoder
    from ssl_ae.stages.rival import Rival
    from ssl_ae.stages.workspace import Workspace
    from ssl_ae.trace import UNLABELED

    torch.set_num_threads(1)
    data, raw, run = dict(np.load(stored)), np.load(stored.with_name("raw.npz")), stored.with_name("run")
    rows = draw(data["y_train"], count, seed, how)
    x, y, truth = data["x_train"][rows], data["y_train"][rows], data["y_test"]
    z, x_test = (torch.from_numpy(data[name]) for name in ("z_train", "x_test"))
    known = torch.full((len(z),), UNLABELED)
    known[rows] = torch.from_numpy(y)
    silent = Reporter(silent=True)
    trained = Autoencoder.load(run, silent)
    ws = Workspace(trained.resolved, Rows(raw["x_train"]), run, trained.device, silent)
    head, began = Auto(Auto.Config(**options), trained.resolved.shapes), time.process_time()
    rival = head.rival()
    head.fit(z, known, torch.from_numpy(x), *([] if rival is None else [Rival(ws, trained.model, rival, "auto")]))
    seconds = time.process_time() - began
    with torch.no_grad():  # by the encoder that the head has left, which may have learned from the labels
        p = head.predict(trained.model.eval().features(x_test), x_test).probs
    found = {"auto": (p.argmax(1).numpy() == truth).mean()}
    rivals = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "forest": RandomForestClassifier(random_state=0),
    }
    found |= {name: rival.fit(x, y).score(x_test.numpy(), truth) for name, rival in rivals.items()}
    return {name: 100 * float(value) for name, value in found.items()} | {"took": NAMES[int(head.taken)], "seconds": seconds}


def row(name: str, count: int, cells: list[dict[str, Any]]) -> tuple[float, bool, str]:
    """Regret of a cell of the table, whether it is surely above 0, and its line of Markdown."""
    means = {side: statistics.mean(each[side] for each in cells) for side in ("logistic", "forest", "auto")}
    best = max(("logistic", "forest"), key=means.get)
    losses = [each[best] - each["auto"] for each in cells]
    regret, sd = statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else float("nan")
    worse = regret > stats.t.ppf(0.975, len(losses) - 1) * sd / len(losses) ** 0.5  # Student's t over the draws, two-sided 5 %
    took = ", ".join(f"{model} {times}" for model, times in Counter(each["took"] for each in cells).most_common())
    shown = [f"{means[side]:.1f}" for side in ("logistic", "forest", "auto")]
    mark = " **worse**" if worse else ""
    return regret, worse, f"| {name} | {count} | {' | '.join(shown)} | {regret:+.2f} ± {sd:.2f}{mark} | {took} |"


def table(cells: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Markdown, with the averages over all cells below it."""
    rows = {place: row(*place, found) for place, found in cells.items()}
    regrets = [regret for regret, _, _ in rows.values()]
    worse = [f"{name} at {count}" for (name, count), (_, sure, _) in rows.items() if sure]
    lines = [
        "| data | labels | logistic | forest | auto | regret ± sd | auto took |",
        "|---|---|---|---|---|---|---|",
        *(line for _, _, line in rows.values()),
        "",
        f"Mean regret {statistics.mean(regrets):+.2f} points over {len(regrets)} cells (gains counted as 0: "
        f"{statistics.mean(max(0.0, regret) for regret in regrets):.2f}), largest {max(regrets):+.2f}. "
        f"Surely worse: {', '.join(worse) or 'none'}. "
        f"{statistics.mean(each['seconds'] for found in cells.values() for each in found):.1f} s of one core a head.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/do-no-harm"))
    parser.add_argument("--data", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--draws", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="of the head, such as '{\"trees\": 50}'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()

    places = {name: prepare(name, given.out) for name in given.data}
    for name in [name for name, place in places.items() if place is None]:
        print(f"{name}: not on this machine, left out")
        del places[name]
    kept = given.out / "cells.jsonl"
    done = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            key, found = json.loads(line)
            done[tuple(key)] = found
    setting = json.dumps(given.options, sort_keys=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    wanted = [
        (how, seed, name, count, setting) for how in given.draws for seed in seeds for name in places for count in given.labels
    ]
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool, kept.open("a") as file:
        waiting = {
            key: pool.submit(cell, places[key[2]], key[0], key[3], key[1], given.options) for key in wanted if key not in done
        }
        for key, future in waiting.items():
            done[key] = future.result()
            file.write(json.dumps([key, done[key]]) + "\n")
            file.flush()
    for how in given.draws:
        cells = {
            (name, count): [done[how, seed, name, count, setting] for seed in seeds] for name in places for count in given.labels
        }
        text = table(cells)
        (given.out / f"{how}.md").write_text(text + "\n")
        print(f"\ntest accuracy in %, {how} draws of labels, seeds {seeds[0]} to {seeds[-1]}\n\n{text}")


if __name__ == "__main__":
    main()
