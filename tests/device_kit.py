"""An accelerator that every machine has: tensors that say they are on it, and that no operation mixes with those of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

THERE, HOST = torch.device("cuda", 0), torch.device("cpu")
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # by indices of the host, too
MIXES = INDEXING | {Tensor.copy_}


class Accelerator(TorchFunctionMode):
    """While it is entered, what is made for `THERE` is computed on the host but keeps to CUDA's rules.

    `device` tells where a tensor is; what comes of tensors that are there is there; numpy wants it brought back first; an
    operation on tensors of both places raises, unless those of the host are single numbers, indices, or the source of a copy.
    """

    _there = WeakIdKeyDictionary()  # of all accelerators: there is one such device

    def holds(self, tensor: Tensor) -> bool:
        return tensor in self._there

    def send(self, tensor: Tensor) -> Tensor:
        found = tensor.clone()
        self._there[found] = True
        return found

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        inputs = [*tensors((args, kwargs))]
        there, here = ([each for each in inputs if self.holds(each) == held] for held in (True, False))
        if func == Tensor.device.__get__:
            return THERE if there else HOST
        if func is Tensor.cpu:
            return args[0].clone()
        if func is Tensor.numpy and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.to:
            return self._moved(args, kwargs)
        wanted = kwargs.get("device")
        result = func(*args, **(kwargs | {"device": HOST} if wanted is not None else kwargs))
        if there and func not in MIXES and any(each.dim() for each in here):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func.__name__} was given cuda:0 and cpu.")
        goes_there = torch.device(wanted).type == "cuda" if wanted is not None else self._result_there(func, args, there)
        return tree_map(self._mark, result) if goes_there else result

    def _result_there(self, func, args, there: list[Tensor]) -> bool:
        return self.holds(args[0]) if func in MIXES else bool(there)

    def _moved(self, args, kwargs) -> Tensor:
        source, *rest = args
        asked = [*rest, *kwargs.values()]
        place = self.holds(source)
        for each in asked:
            if isinstance(each, Tensor):
                place = self.holds(each)
            elif isinstance(each, torch.device | str):
                place = torch.device(each).type == "cuda"
        dtypes = [each.dtype if isinstance(each, Tensor) else each for each in asked]
        dtype = next((each for each in dtypes if isinstance(each, torch.dtype)), source.dtype)
        if place == self.holds(source) and dtype == source.dtype:
            return source
        found = source.to(dtype, copy=True)
        return self._mark(found) if place else found

    def _mark(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._there[value] = True
        return value


def tensors(tree: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(tree) if isinstance(each, Tensor))
