"""What the processes of `laws/test_ranks.py` run: importable by name, because a spawned process imports afresh."""

import copy
import os
import socket

import torch
import torch.multiprocessing as multiprocessing
from engine_kit import Keep, MeanCode, feed_of, fresh, gradients, judge, resolved, rows, trainer_of, weights

from ssl_ae import distributed
from ssl_ae.checkpoint import Checkpoint
from ssl_ae.training import micro_batches

X, Y = rows(29, labeled=0.3)
WEIGHTS = {"name": "weights", "weight": 0.02}
SIGMOID = {"name": "mlp", "widths": [11], "activation": "sigmoid", "code_activation": "sigmoid"}
LABEL = {"name": "conditional_mlp", "widths": [11]}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}


def scenario(
    mode,
    optimizer=None,
    regularizers=(WEIGHTS, {"name": "sparse_l1", "weight": 0.3}),
    extra=((MeanCode, 0.7),),
    encoder=None,
    decoder=None,
    **training,
):
    training = {"alpha": 0.4, "log_every": 1, "epochs": 2, **({"optimizer": optimizer} if optimizer else {}), **training}
    only_finetune, only_pretrain = {"alpha", "labeled_fraction"}, {"slice_epochs"}
    parts = {name: part for name, part in (("encoder", encoder), ("decoder", decoder)) if part}
    return mode, {
        "model": {"regularizers": list(regularizers), **parts},
        "extra": extra,
        "pretrain": {name: value for name, value in training.items() if name not in only_finetune},
        "finetune": {name: value for name, value in training.items() if name not in only_pretrain},
    }


SCENARIOS = {
    "joint": scenario("joint"),
    "joint, AdamW, clipped": scenario("joint", ADAMW, clip_norm=0.5),
    "joint, AdamW, clipped, averaged": scenario("joint", ADAMW, clip_norm=0.5, ema=0.9),
    "alternate": scenario("alternate"),
    "alternate, codes without gradient": scenario(
        "alternate", extra=(), encoder={"name": "sparse_coding", "sparsity": 0.3}, decoder={"name": "linear"}
    ),
    "end-to-end": scenario("end-to-end"),
    "end-to-end, the teacher's classes aligned": scenario(
        "end-to-end", extra=(), regularizers=({"name": "consistency", "threshold": 0.34, "align": True},), ema=0.9
    ),
    "pretrain": scenario("pretrain", extra=()),
    "pretrain, layer by layer": scenario("pretrain", ema=0.9, slice_epochs=1, encoder={"name": "stack", "widths": [11]}),
    "pretrain, mean activity": scenario(
        "pretrain", regularizers=({"name": "sparse_kl", "layers": ["h*", "code"], "weight": 0.7},), extra=(), encoder=SIGMOID
    ),
    "joint, a label that is summed out": scenario(
        "joint", extra=(), regularizers=({"name": "label_kl"},), encoder=LABEL | {"posterior": "point"}, decoder=LABEL
    ),
    "joint, batches that two ranks cannot halve": scenario("joint", batch_size=11),
    "joint, one part on one rank and two on the other": scenario("joint", batch_size=3),
}


SHARDED = [
    "joint, AdamW, clipped",
    "alternate, codes without gradient",
    "pretrain, mean activity",
    "joint, one part on one rank and two on the other",
]


def prepared(name, micro, adamw=False, shards=False, dtype=torch.float64, **more):
    """A trainer of the scenario on this rank, and its first batch."""
    mode, sections = SCENARIOS[name]
    for stage in ("pretrain", "finetune"):
        sections = sections | {stage: sections[stage] | {"micro_batches": micro} | ({"optimizer": ADAMW} if adamw else {})}
    found = resolved(**sections)
    feed = feed_of(X, Y, dtype=dtype, rank=distributed.rank(), world=distributed.world())
    trainer = trainer_of(found, mode, feed, fresh(found, dtype=dtype), shards=shards, **more)
    trainer.validate = judge(trainer, feed) if mode == "pretrain" else (lambda model, objective: {})
    (batch,) = feed.batches([(trainer.runs[0].phase.draw, 0)])
    return trainer, batch


def train(name, micro, **more):
    """Gradients of the first step; weights, readings, validation and the first checkpoint of a whole run; on this rank."""
    first, batch = prepared(name, micro, **more)
    first.make_step(first.runs[0], micro_batches(batch, micro))
    listener, saved = Keep(), []
    trainer, _ = prepared(
        name, micro, listener=listener, save=lambda checkpoint: saved.append(copy.deepcopy(vars(checkpoint))), **more
    )
    trainer.run()
    return {
        "gradients": distributed.gather(gradients(first.model), everywhere=True),
        "weights": distributed.gather(weights(trainer.model), everywhere=True),
        "kept": weights(trainer.kept()),
        "measures": listener.measures,
        "epochs": listener.epochs,
        "rows": batch.row,
        "checkpoint": saved[0],
    }


def resumed(name, micro, checkpoint, **more):
    """Weights of a run that went on from a checkpoint, on this rank."""
    trainer, _ = prepared(name, micro, **more)
    trainer.restore(Checkpoint(**copy.deepcopy(checkpoint)))
    trainer.run()
    return weights(trainer.kept())


def few_rows():
    """One row to validate, one label to train on: the other rank has none, and nobody may wait for it."""
    feed = feed_of(X[:1], Y[:1] * 0, rank=distributed.rank(), world=distributed.world())
    mode, sections = SCENARIOS["end-to-end"]
    found = resolved(**sections | {"finetune": sections["finetune"] | {"micro_batches": 2}})
    trainer = trainer_of(found, mode, feed)
    trainer.validate = judge(trainer, feed)
    trainer.run()
    return {"weights": weights(trainer.model), "history": trainer.progress.history}


def poisoned():
    """A row that is not a number on the last rank alone: every rank must skip the step."""
    feed = feed_of(X, Y, rank=distributed.rank(), world=distributed.world())
    trainer = trainer_of(resolved(), "pretrain", feed)
    before = weights(trainer.model)
    (batch,) = feed.batches([(trainer.runs[0].phase.draw, 0)])
    if distributed.rank() == distributed.world() - 1:
        batch.x[0, 0] = torch.nan
    trainer.make_step(trainer.runs[0], [batch])
    return {"before": before, "after": weights(trainer.model), "skipped": int(trainer.runs[0].watch.skipped)}


def agreed():
    """After which of 32 steps a rank learns that the last rank was asked to stop after step 3."""
    agreement = distributed.Agreement()
    here = distributed.rank() == distributed.world() - 1
    learnt = [step for step in range(1, 33) if agreement.asked(here and step >= 3, step)]
    agreement.close()
    return learnt


def work(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    with distributed.process_group("cpu"):
        results = {name: train(name, 2) for name in SCENARIOS}
        results |= {"few rows": few_rows(), "poisoned": poisoned(), "agreed": agreed()}
        for name in SHARDED:
            whole = train(name, 2, adamw=True)
            sharded = train(name, 2, adamw=True, shards=True)
            (checkpoint,) = distributed.from_main([whole["checkpoint"]])
            sharded["from whole"] = resumed(name, 2, checkpoint, adamw=True, shards=True)
            results |= {f"whole {name}": whole, f"sharded {name}": sharded}
        # gloo reduces single precision by other kernels
        results["float32"] = [
            train("joint", 2, shards=shards, adamw=True, dtype=torch.float32)["kept"] for shards in (False, True)
        ]
    torch.save(results, folder / f"rank-{rank}.pt")


def of_two_ranks(work, folder):
    """What `work(rank, world, port, folder)` left in folder/rank-R.pt, run by two processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (2, port, folder), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
