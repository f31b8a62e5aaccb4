"""What a training step launches on a GPU, and what that costs the host, found without one.

A whole step (augmentation, three branches, losses, backward, optimiser with moving average) runs on meta
tensors through the launchers that a GPU's tensors take. An operator of PyTorch counts as one launch, which is
the least it is; what it reads and writes are its operands, each once.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_kernels import GraphPool, absent_gpu
from elastic_kernels.triton_ops.registration import LAUNCHERS
from poa.block_graphs import BlockGraphs
from poa.config import Config
from poa.memory import planned_state
from poa.optim import Schedules
from poa.step import train_step
from poa.subnets import Subnet
from poa.warmup import micro_batch_of, noise

LIBRARIES = {
    **dict.fromkeys(("addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "dot"), "cuBLAS"),
    **dict.fromkeys(("convolution", "convolution_backward"), "cuDNN"),
}
T = TypeVar("T")
FREE = {  # operators that launch nothing, beside views
    "alias", "detach", "detach_", "empty", "empty_like", "empty_permuted", "empty_strided", "lift_fresh",
    "new_empty", "new_empty_strided", "_unsafe_view",
}  # fmt: skip
COPIES_FIRST = {"index_add", "index_put", "select_backward", "slice_backward"}  # a launch more
OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_"}  # do not read what they write
PARTIAL = {"index", "index_select", "gather"}  # read as much as they write
IMPLICIT = "CompositeImplicitAutograd"


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators on meta tensors, also inside of our operators.

    Attributes:
        launches, bytes: by kind and name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.__name__.partition(".")[0]
        if function.namespace == "elastic_kernels":
            with self:
                return LAUNCHERS[name](*args, **kwargs)
        if _consists_of_others(function):
            with self:
                return function.decompose(*args, **kwargs)
        result = function(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if not function.is_view and name not in FREE and any(t.is_meta for t in (*inputs, *outputs)):
            size = _traffic(name, inputs, outputs)
            self.note(name, args, _count(name, args), size, inputs, outputs)
        return result

    def note(
        self,
        name: str,
        args: Sequence[Any],
        count: int,
        size: int,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """Take an operator that launches so many kernels, and reads and writes so many bytes."""
        key = LIBRARIES.get(name, "other"), name
        self.launches[key] += count
        self.bytes[key] += size


@cache
def _consists_of_others(function: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), IMPLICIT)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _count(name: str, args: Sequence[Any]) -> int:
    if name == "convolution_backward":
        return sum(args[-1])  # gradients that are asked for
    return 1 + (name in COPIES_FIRST)


def _traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    read, written = sum(map(_size, inputs)), sum(map(_size, outputs))
    if name in PARTIAL:
        return 2 * written + read - _size(inputs[0])
    return read if name in OVERWRITE else read + written


def _size(tensor: Tensor) -> int:
    """Bytes, of an expanded tensor those that exist."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


@contextmanager
def native_shapes() -> Iterator[None]:
    """Let meta tensors take PyTorch's C++ kernels, where there are Python ones beside them.

    Those find shapes and outputs as a GPU's kernels do, in about their time; the Python ones, made for
    tracing, take ten times as long. Products with a wider output have only one that multiplies and copies;
    here they leave their output as it is.
    """
    from torch import _meta_registrations as registrations
    from torch._decomp import global_decomposition_table as tables

    python = registrations._meta_lib_dont_use_me_use_register_meta
    functions = {**tables["pre_autograd"], **tables["post_autograd"], **tables["meta"]}
    overloads = {operator: f for operator, f in functions.items() if isinstance(operator, OpOverload)}
    names = {operator: f"{operator.name().replace('::', '/')}/Meta" for operator in overloads}
    known = {operator: f for operator, f in overloads.items() if names[operator] in python._op_impls}
    python._destroy()
    only = torch.library.Library("aten", "IMPL", "Meta")
    try:
        for operator, function in known.items():
            if operator is torch.ops.aten.addmm.dtype_out:
                only.impl(operator, lambda *_, out, **__: out)
            elif not _has_native_shapes(operator):
                only.impl(operator, function)
        yield
    finally:
        only._destroy()
        again = torch.library.Library("aten", "IMPL", "Meta")
        for operator, function in known.items():
            again.impl(operator, function)
        registrations._meta_lib_dont_use_me_use_register_meta = again


def _has_native_shapes(operator: OpOverload) -> bool:
    if "convolution" in operator.name():  # the C++ one asks for the device's library
        return False
    explicit = "CompositeExplicitAutograd"
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)
        for key in ("Meta", explicit, f"{explicit}NonFunctional")
    )


class AbsentGraphs(GraphPool):
    """Graphs of a GPU that nobody has: what they hold is launched while it is captured, and then no more."""

    device_type = "meta"

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        return self._replay, work()

    def _replay(self) -> None:
        self.replays += 1


@contextmanager
def step_of(
    config: Config, elastic: Subnet, graphs: AbsentGraphs | None = None
) -> Iterator[Callable[[], None]]:
    """A step of the preset as a run takes it, masks and all, without logging; use it in `absent_gpu`.

    Its blocks are in `graphs`, if the configuration has them, from the third step on.
    """
    state, canvases = planned_state(config), noise(config)
    if graphs is not None and config.performance.cuda_graphs:
        state.graphs = BlockGraphs(torch.device("meta"), graphs)
    schedules = Schedules.build(config.method.optim, 1, config.method.batch_size)

    def step() -> None:
        micro_batch = micro_batch_of(canvases, config, state, elastic, masked=True)
        train_step(state.student, state, config, schedules, 0, [micro_batch])

    with state.undisturbed():
        yield step


def host_milliseconds(step: Callable[[], None], repeats: int) -> list[float]:
    """CPU time of this process for each step, after one that makes what later ones find."""
    times = []
    with native_shapes():
        for _ in range(repeats + 1):
            gc.collect()
            started = time.process_time()
            step()
            times.append((time.process_time() - started) * 1e3)
    return times[1:]


def run(config: Config, elastic: Subnet, repeats: int = 5) -> tuple[list[str], dict[str, Any]]:
    """Count and time a step, the fastest of some repeats.

    Returns:
        Lines of a table, and a summary: launches, those of each kind, bytes of those that are neither ours
        nor a library's products, and the host's milliseconds, without what the driver needs for a launch.
    """
    operators, graphs = Operators(), AbsentGraphs()
    with absent_gpu() as launches, step_of(config, elastic, graphs) as step:
        for _ in range(3 if config.performance.cuda_graphs else 1):  # captures; makes the optimiser's tables
            step()
        launches.made.clear()
        graphs.replays = 0
        with operators:
            step()
        kernels = Counter(launch.binary.name for launch in launches.made)
        replays = graphs.replays
        times = host_milliseconds(step, repeats)
    rows = Counter({("Triton", name): count for name, count in kernels.items()}) + operators.launches
    rows += Counter({("graph", "replay"): replays})
    lines = [f"{'kind':8}{'launches':>9}{'GB':>9}  operator"]
    for (kind, name), count in rows.most_common():
        size = f"{operators.bytes[kind, name] / 1e9:.2f}" if kind not in ("Triton", "graph") else ""
        lines.append(f"{kind:8}{count:9,}{size:>9}  {name}")

    def total(of: str, counts: Counter[tuple[str, str]] = rows) -> int:
        return sum(count for (kind, _), count in counts.items() if kind == of)

    return lines, {
        "launches": rows.total(),
        **{kind.lower(): total(kind) for kind in ("Triton", "cuBLAS", "cuDNN", "graph", "other")},
        "other_gb": round(total("other", operators.bytes) / 1e9, 2),
        "host_ms": round(min(times), 1),
    }
