"""Steps whose gradients are summed over ranks: every rank with the whole model (ddp), or with a share of it (fsdp)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ae.errors import RecipeError

# torch's kinds of sharded tensors, once a model is sharded: importing them imports torch's compiler, which takes seconds
_kinds: tuple[type, ...] = ()


class Shards(nn.Module):
    """A model of which each rank stores 1/world: weights, gradients and what the optimizer keeps of them.

    Whatever runs inside the forward pass of this module sees whole weights, from wherever it takes them; the backward pass
    leaves shards again. So no component has to know, and a step needs memory for one copy of the weights and their gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises RecipeError for a model with a parameter that cannot be cut."""
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                raise RecipeError(
                    f"parallel: fsdp: the parameter {name} has no dimension to cut. Its plugin must give it the shape (1,); "
                    "until then, parallel: ddp."
                )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        global _kinds
        _kinds = (DTensor,)
        self.model = model
        device = next(model.parameters()).device.type
        fully_shard(self, mesh=init_device_mesh(device, (dist.get_world_size(),)), reshard_after_forward=False)
        self.set_force_sum_reduction_for_comms(True)  # gloo multiplies no float32 on the way
        self.set_gradient_divide_factor(1.0)  # sums: the objective has divided by the rows of all ranks

    def forward(self, step: nn.Module, *arguments: Any) -> Tensor:
        return step(*arguments)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights inside the block, for reading. Every rank must enter it."""
        self.unshard()
        try:
            yield
        finally:
            self.reshard()


class ShardedStep(nn.Module):
    """A step of a sharded model."""

    def __init__(self, step: nn.Module, shards: Shards) -> None:
        super().__init__()
        self.step = step
        self._shards = [shards]  # in a list: several phases share it

    @property
    def shards(self) -> Shards:
        return self._shards[0]

    def forward(self, *arguments: Any) -> Tensor:
        return self.shards(self.step, *arguments)


def parallel(step: nn.Module, shards: Shards | None = None) -> nn.Module:
    """`step` with gradients reduced over ranks; itself in a world of one.

    Averaged by DistributedDataParallel, or summed over the shards. Only parameters that require gradients now take part; a
    component may leave some of its own unused in a phase.
    """
    if shards is not None:
        return ShardedStep(step, shards)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return step
    return DistributedDataParallel(step, find_unused_parameters=True)


def on_this_rank(step: nn.Module) -> nn.Module:
    """The step without the reduction of its gradients."""
    return step.module if isinstance(step, DistributedDataParallel) else step


def without_sync(step: nn.Module, skip: bool) -> contextlib.AbstractContextManager:
    """Whether this backward pass leaves the reduction to a later micro-batch."""
    if isinstance(step, ShardedStep):
        step.shards.set_requires_gradient_sync(not skip)
        step.shards.set_reshard_after_backward(not skip)  # gathering is for all, and another rank may have fewer parts
    return step.no_sync() if skip and isinstance(step, DistributedDataParallel) else contextlib.nullcontext()


def own_part(value: Tensor) -> Tensor:
    """What this rank stores of a tensor; the same memory."""
    return value.to_local() if isinstance(value, _kinds) else value


def total_norm(gradients: list[Tensor]) -> Tensor:
    """|g| over everything, (), the same on every rank."""
    norm = nn.utils.get_total_norm([own_part(gradient) for gradient in gradients])
    if not any(isinstance(gradient, _kinds) for gradient in gradients):
        return norm
    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def gather(tree: Any, everywhere: bool = False) -> Any:
    """The tree with every sharded tensor whole and on the host: on rank 0, or everywhere. Every rank must call it."""
    if isinstance(tree, _kinds):
        whole = tree.full_tensor()
        return whole.cpu() if everywhere or dist.get_rank() == 0 else torch.empty(0)
    if isinstance(tree, dict):
        return {key: gather(value, everywhere) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather(value, everywhere) for value in tree)
    return tree


def cut(whole: Any, like: Tensor) -> Any:
    """`whole` as `like` is stored: this rank's part of a tensor that is sharded, anything else as it is."""
    if not isinstance(like, _kinds) or not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # every rank has the whole, so nobody has to send it
    return distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: cut(value, own[name]) if name in own else value for name, value in weights.items()})
