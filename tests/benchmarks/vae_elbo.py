"""The ELBO of a fully connected VAE (784-400-20) on MNIST, against a plain PyTorch loop of the same protocol.

    python -m tests.benchmarks.vae_elbo

The protocol is that of PyTorch's own VAE example (github.com/pytorch/examples, vae/main.py): one hidden layer of 400 relu units
on either side, 20 latents, binary cross-entropy on grey values in [0, 1], Adam 1e-3, batches of 128, 10 epochs, one draw. Both
sides learn from the 54,000 rows of our train split (the example from all 60,000; a log of it in pull request 1416 there says
106.66 nats on test after epoch 7). The peer is judged by its own formulas, ours by `ssl_ae.bounds`. While you develop, judge by
`--split val`: test is for the last word.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.linear_pca import flat

HIDDEN, LATENT, BATCH, EPOCHS, LEARNING_RATE = 400, 20, 128, 10, 1e-3
WITHIN = 0.02
ROWS_AT_ONCE = 1000


class Peer(nn.Module):
    """The example's model: log-variances come straight from a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.mean, self.log_variance = nn.Linear(784, HIDDEN), nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.back, self.logits = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, 784)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 784) -> -ELBO of one draw, summed over rows, ()."""
        h = functional.relu(self.hidden(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        logits = self.logits(functional.relu(self.back(z)))
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return cross_entropy - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()


def train_peer(train: Tensor, seed: int) -> Peer:
    """Shuffled epochs, the last batch of each as small as it is."""
    torch.manual_seed(seed)
    peer = Peer()
    optimizer = torch.optim.Adam(peer.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            peer(train[rows]).backward()
            optimizer.step()
    return peer


@torch.no_grad()
def elbo_of_peer(peer: Peer, x: Tensor) -> float:
    return -sum(float(peer(part)) for part in x.split(ROWS_AT_ONCE)) / len(x)


@torch.no_grad()
def bounds_of(model: nn.Module, x: Tensor, draws: int) -> tuple[float, float]:
    """Means over rows of the ELBO by one draw, as the peer's, and of the importance-weighted bound."""
    from ssl_ae.bounds import elbo, importance_weighted_bound

    parts = x.view(-1, 1, 28, 28).split(ROWS_AT_ONCE)
    low = torch.cat([elbo(model, part, part) for part in parts]).mean()
    high = torch.cat([importance_weighted_bound(model, part, part, draws) for part in parts]).mean()
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("pipelines/mnist_vae_fc.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-vae-fc"))
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--draws", type=int, default=50, help="of the importance-weighted bound")
    given = parser.parse_args()

    from ssl_ae import recipe as recipes
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    with open_workspace(recipes.load(given.recipe), given.out, str(given.recipe)) as ws:
        pretrain(ws)
        model, seed = ws.load_pretrained(ws.fresh_model(head=False)), ws.recipe.seed
        train, judged = (torch.from_numpy(flat(ws, split)) for split in ("train", given.split))
    started = time.monotonic()
    peer = train_peer(train, seed)
    print(f"the peer trained in {time.monotonic() - started:.0f} s")
    torch.manual_seed(seed)
    ours, sharper = bounds_of(model.cpu(), judged, given.draws)
    theirs = elbo_of_peer(peer, judged)
    apart = ours / theirs - 1
    print(f"{given.split} ELBO in nats a row: ours {ours:.2f}, plain PyTorch {theirs:.2f}")
    print(f"apart by {100 * apart:+.2f} %, where less than 0 means that ours is the better bound")
    print(f"{given.split} importance-weighted bound of {given.draws} draws: {sharper:.2f}")
    if not math.isfinite(apart) or abs(apart) > WITHIN:
        raise SystemExit(f"the two are more than {100 * WITHIN:g} % apart")


if __name__ == "__main__":
    main()
