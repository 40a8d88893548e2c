"""What a step leaves for the next stays where it is and the host reads none of it: what a recorded step relies on.

The recording itself needs a GPU; its tests are skipped where there is none.
"""

import numpy as np
import pytest
import torch
from engine_kit import SGD, assert_same, fresh, resolved, weights
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_ae.data.loading import Feed, Table
from ssl_ae.plan import pretraining
from ssl_ae.replay import Refused, Replay
from ssl_ae.trace import Batch
from ssl_ae.training import Trainer

ROWS, BATCH, STEPS = 53, 11, 9
X = np.random.default_rng(3).random((ROWS, 7))
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
VAE = {
    "encoder": {"name": "mlp", "widths": [13], "posterior": "diag"},
    "decoder": {"name": "mlp"},
    "regularizers": [{"name": "kl", "warmup_steps": 5}],
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing records a CUDA graph")


def trainer_on(device: torch.device, optimizer: dict, replay: bool, **training) -> Trainer:
    options = {"optimizer": optimizer, "batch_size": BATCH, "schedule": {"name": "cosine"}, "clip_norm": 1.0, **training}
    found = resolved(pretrain=options, model=VAE)
    model = fresh(found).float()
    feed = Feed(Table(X.astype(np.float32)), None, lambda x: x, seed=5, device=device, residency="resident")
    plan = pretraining(found, model, ROWS)
    return Trainer(model, plan, feed, found.recipe.pretrain, seed=5, device=device, replay=replay)


def make_steps(trainer: Trainer, count: int = STEPS) -> None:
    run = trainer.runs[0]
    for batch in trainer.feed.batches((run.phase.draw, k) for k in range(count)):
        trainer.make_step(run, [batch])
        trainer.progress.step += 1


def lasting(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that a step reads and the step before wrote."""
    run = trainer.runs[0]
    found = {f"weight {name}": value for name, value in trainer.model.state_dict(keep_vars=True).items()}
    for i, (_, state) in enumerate(run.optimizer.state.items()):
        found |= {f"optimizer {i} {name}": value for name, value in state.items()}
    watched = {name: value for name, value in vars(run.watch).items() if torch.is_tensor(value)}
    assert len(watched) == 4
    return found | watched | {"shares": run.shares, "steps": run.steps, "step": trainer.stepper.step_on_device}


@pytest.mark.parametrize("optimizer", [SGD | {"momentum": 0.9}, ADAMW], ids=lambda options: options["name"])
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
def test_a_step_writes_in_place(optimizer, bad):
    trainer = trainer_on(torch.device("cpu"), optimizer, replay=False)
    make_steps(trainer, 2)  # the optimizer makes its state in the first
    before = {name: (value.data_ptr(), value.detach().clone()) for name, value in lasting(trainer).items()}
    x = torch.from_numpy(X[:BATCH].astype(np.float32))
    trainer.make_step(trainer.runs[0], [Batch(x=x * (float("nan") if bad else 1.0))])
    after = lasting(trainer)
    assert {name: value.data_ptr() for name, value in after.items()} == {name: place for name, (place, _) in before.items()}
    changed = {name for name, (_, value) in before.items() if not torch.equal(after[name], value)}
    assert "step" in changed
    assert ("skipped" in changed) == bad


class Reads(TorchDispatchMode):
    """Counts how often the host takes a number from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_host_reads_nothing_in_a_step():
    trainer = trainer_on(torch.device("cpu"), ADAMW, replay=False)
    make_steps(trainer, 2)
    trainer.runs[0].watch.see = lambda *seen: None  # on a CPU alone it looks, because nobody waits there
    with Reads() as reads:
        trainer.make_step(trainer.runs[0], [Batch(x=torch.from_numpy(X[:BATCH].astype(np.float32)))])
    assert reads.count == 0
    with reads:
        bool(torch.ones(()) > 0)
    assert reads.count == 1  # the count counts


@needs_gpu
@pytest.mark.parametrize("optimizer", [SGD | {"momentum": 0.9}, ADAMW], ids=lambda options: options["name"])
def test_replayed_steps_are_launched_steps(optimizer):
    gpu, found = torch.device("cuda"), {}
    for replay in (False, True):
        trainer = trainer_on(gpu, optimizer, replay)
        make_steps(trainer)
        found[replay] = weights(trainer.model) | {"shares": trainer.runs[0].shares.clone()}
    assert_same(found[True], found[False])


@needs_gpu
def test_what_cannot_be_recorded_is_launched_and_said():
    said = []
    trainer = trainer_on(torch.device("cuda"), ADAMW, replay=True)
    trainer.stepper.warn = said.append
    trainer.runs[0].watch.see = lambda found, *rest: bool(found)  # the host waits
    make_steps(trainer)
    launched = trainer_on(torch.device("cuda"), ADAMW, replay=False)
    make_steps(launched)
    assert_same(weights(trainer.model), weights(launched.model))
    assert [("CUDA graph" in message) for message in said] == [True]


@needs_gpu
def test_a_refusal_runs_nothing():
    total = torch.zeros((), device="cuda")

    def work(batch: Batch) -> None:
        total.add_(batch.x.sum())
        total.item()

    replay = Replay(work)
    batch = Batch(x=torch.ones(2, 3, device="cuda"))
    for _ in range(3):
        replay(batch)
    with pytest.raises(Refused):
        replay(batch)
    assert total.item() == 3 * 6  # three launched calls of 2 x 3 ones


def test_on_a_processor_nothing_is_recorded():
    trainer = trainer_on(torch.device("cpu"), ADAMW, replay=True)
    make_steps(trainer, 2)
    assert trainer.runs[0].replay is None
