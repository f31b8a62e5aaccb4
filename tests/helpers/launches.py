"""Count what a step would launch on a GPU, from a trace of it on the CPU.

Every operator of PyTorch that computes or copies counts as one launch, every Triton kernel as one; views and
allocations as none. A library's operator may launch more than one kernel, so this is a lower bound.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "set_",
)

# What makes the host wait for a device: numbers and shapes that depend on a tensor's values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


class Launches(TorchDispatchMode):
    """Launches by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0  # that operators read and write, at most: an index may choose a part
        self.implementations: dict[str, Any] = {}  # of this package's operators

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        if function.namespace == "elastic_kernels":
            if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(args)):
                return self._moved(function(*args, **(kwargs or {})), args)
            with self:  # its launches and what surrounds them
                return self.implementations[name](*args, **(kwargs or {}))
        if not function.is_view and name not in FREE:
            self.counts[name] += 1
            return self._moved(function(*args, **(kwargs or {})), args)
        return function(*args, **(kwargs or {}))

    def _moved(self, outputs: Any, inputs: Any) -> Any:
        tensors = [t for t in tree_leaves((inputs, outputs)) if isinstance(t, Tensor)]
        sizes = {id(t): min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors}
        self.bytes += sum(sizes.values())
        return outputs


@contextmanager
def launches() -> Iterator[Launches]:
    """Count while the context lasts; Triton's kernels under its interpreter, which does not run them."""
    from triton.runtime.interpreter import GridExecutor

    from elastic_kernels import triton_ops

    record, call = Launches(), GridExecutor.__call__
    names = [module.name for module in pkgutil.iter_modules(triton_ops.__path__)]
    modules = [importlib.import_module(f"{triton_ops.__name__}.{name}") for name in names]
    record.implementations = {name: f for module in modules for name, f in vars(module).items()}

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        record.counts[executor.fn.__name__] += 1

    GridExecutor.__call__ = counted
    try:
        with record:
            yield record
    finally:
        GridExecutor.__call__ = call
