"""Recorder of passes on a CPU: keeps every operation of a computation, and repeats them on the same tensors.

It stands for a CUDA graph where there is none. As in a graph, numbers of Python are those of the recording for ever, tensors from outside
are taken from where they were, and an operation that has to look at a value on the device cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeline.engines.transformers.replay import Computation

UNRECORDABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class OperationRecorder(TorchDispatchMode):
    """The operations of a computation, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        """Each operation with its arguments and what it returned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if UNRECORDABLE & {*func.tags} or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(f"{func} needs a value from the device, or brings one from Python")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> dict[int, Tensor]:
        """Repeat all operations; return the new tensors by the ids of those that were recorded."""
        made: dict[int, Tensor] = {}
        for func, args, kwargs, recorded in self.operations:
            args, kwargs = tree_map_only(Tensor, lambda tensor: made.get(id(tensor), tensor), (args, kwargs))
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new
        return made

    def list_outside(self) -> list[Tensor]:
        """Return the tensors that were not made by these operations: weights, cache, staged words."""
        made: set[int] = set()
        outside: dict[int, Tensor] = {}
        for _, args, kwargs, recorded in self.operations:
            outside.update({id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and id(leaf) not in made})
            made |= {id(leaf) for leaf in tree_leaves(recorded) if id(leaf) not in outside}
        return list(outside.values())


def make_operation_recorder() -> Callable[[Computation, Tensor], tuple[Callable[[], object], Tensor]]:
    """Return a recorder for `PassReplays`."""

    def record(compute: Computation, words: Tensor) -> tuple[Callable[[], object], Tensor]:
        with OperationRecorder() as seen:
            result = compute(words)
        return lambda: result.copy_(seen.repeat()[id(result)]), result

    return record
