"""Modules replayed as CUDA graphs: the host launches one graph instead of every kernel.

    first call        as it is: kernels are compiled and loaded, cuBLAS gets its handles
    second call       captured: a graph of the forward and, where gradients are needed, one of the backward
    from then on      inputs are copied to where the graph reads them, and it is launched

No autograd graph outlives a capture, so what a forward keeps for its backward goes back to the memory that
all graphs of a `GraphPool` share. It holds from a forward to its backward, and no other replay may come
between.

Captured are stand-ins for the parameters, whose memory and gradients they share: hooks of the parameters and
the streams of their gradient accumulation, which DDP holds on to, take no part in it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from elastic_kernels.dispatch import autocast_dtype, without_autocast
from elastic_kernels.shared_gradients import shared_gradients
from elastic_kernels.working_weights import current_copies, standing_in

T = TypeVar("T")
ALIGNMENT = 512  # bytes, as of PyTorch's allocator: Triton compiles for the alignment of pointers


class GraphPool:
    """Memory for the graphs of several modules, of which one is under way at a time.

    Inputs and results lie in it, too, those of all graphs in the same place.

    Example:
        >>> import torch
        >>> from elastic_kernels import GraphedModule, GraphPool
        >>> pool = GraphPool()
        >>> first, second = (GraphedModule(torch.nn.Linear(8, 8), pool) for _ in range(2))
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        self.turn: object = None  # of the replayed forward whose backward may follow
        self._place: tuple[Any, torch.cuda.Stream] | None = None
        self._arena: Tensor | None = None
        self._reserved = 0

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the launches of `work`: what launches them again, and what `work` returned."""
        if self._place is None:
            device = None if self._arena is None else self._arena.device
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        (pool, stream), graph = self._place, torch.cuda.CUDAGraph()
        # Not "global": threads of data loaders pin memory meanwhile, NCCL's ask for events.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result

    def reserve(self, likes: Sequence[Tensor]) -> None:
        """There will be graphs with such inputs and results."""
        self._reserved = max(self._reserved, sum(map(_bytes, likes)))

    def room(self, likes: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like these, where other graphs have theirs; autograd takes none for a view of another."""
        starts = [*itertools.accumulate(map(_bytes, likes), initial=0)]
        if self._arena is None or len(self._arena) < starts[-1]:
            size, device = max(self._reserved, starts[-1]), likes[0].device
            self._arena = torch.empty(size, dtype=torch.uint8, device=device)
        memory, arena = self._arena.untyped_storage(), self._arena
        return [
            arena.new_empty(0, dtype=like.dtype).set_(
                memory, start // like.itemsize, like.shape, like.stride()
            )
            for start, like in zip(starts, likes, strict=False)
        ]


def _bytes(like: Tensor) -> int:
    sides = zip(like.shape, like.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in sides) if like.numel() else 0
    return -(-extent * like.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Graphs:
    """What was captured of a call, and where its tensors lie: those that are filled before a replay of the
    forward, its result, and gradients of the result and of the first input, if there are such."""

    filled: list[Tensor]
    out: Tensor
    dout: Tensor | None
    dx: Tensor | None
    forward: Callable[[], None]
    backward: Callable[[], None] | None


class GraphedModule:
    """A module on tokens `[tokens, w]` that is replayed as CUDA graphs from its second call on.

    There are graphs for each combination of what arguments hold beside the values of tensors (shapes,
    strides, dtypes, numbers), of autocast's dtype, and of whether gradients are needed. What else would
    change the launches, such as `backend`, must not change. The module must be one that can be captured: it
    never waits for the device, copies nothing from the host, and what it launches does not depend on values.
    Elastic blocks are such modules.

    Gradients of parameters are added to `.grad` in place, and a parameter without one gets zeros; hooks see
    none. A graph is not replayed if a parameter, its `.grad` or its copy of `working_weights` lies elsewhere
    than in the call before: that call is as the first one again. So let gradients stay where they are, with
    `zero_grad(set_to_none=False)`.

    Args:
        module: its parameters and buffers are found once; its hooks run in calls that are not replayed.
        pool: to be shared with modules that are called one after the other, default its own.

    Calling it takes `x` `[tokens, w]`, floating point, on a CUDA device, and other arguments of the module:
    tensors, dataclasses and sequences of them, and hashable values. Only `x` and parameters get gradients.
    The result lies where that of the next call with the pool will lie: it must have been read by then, and is
    not to be overwritten.

    Raises:
        ValueError: `x` is on another device.
        RuntimeError: in a backward that does not come before the next call with the same pool, or before
            which gradients moved.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, GraphedModule
        >>> block, device = ElasticBlock(64, 256, 16), "cuda" if torch.cuda.is_available() else "cpu"
        >>> graphed = GraphedModule(block.to(device)) if device == "cuda" else block
        >>> for _ in range(3):
        ...     x = torch.randn(10, 32, device=device, requires_grad=True)
        ...     graphed(x, ((2, 5),)).sum().backward()
        >>> block.mlp.fc1.weight.grad.shape
        torch.Size([256, 64])
    """

    def __init__(self, module: nn.Module, pool: GraphPool | None = None):
        self.module, self.pool = module, pool or GraphPool()
        self._parameters = dict(module.named_parameters())
        self._read = [*self._parameters.values(), *module.buffers()]
        self._before: dict[Hashable, tuple[list[int], Tensor]] = {}  # addresses, and a result without values
        self._graphs: dict[Hashable, _Graphs] = {}

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        if x.device.type != self.pool.device_type:
            raise ValueError(f"GraphedModule: expected x on a {self.pool.device_type} device, got {x.device}")
        x, grad = x.contiguous(), torch.is_grad_enabled()
        bases: dict[int, tuple[int, Tensor]] = {}
        key = x.shape, x.dtype, x.requires_grad, grad, autocast_dtype(x.device), _form(arguments, bases)
        trained = [p for p in self._parameters.values() if grad and p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        addresses = [t.data_ptr() for t in (*self._read, *current_copies(self._parameters.values()))]
        addresses += _gradients(trained)
        sources = [x, *(base for _, base in bases.values())]
        if key not in self._before or self._before[key][0] != addresses:
            self._graphs.pop(key, None)
            y = self._as_it_is(x, arguments)
            self._before[key] = addresses, torch.empty_like(y, device="meta")
            self.pool.reserve([*sources, x, y, y])
            return y
        if key not in self._graphs:
            self._graphs[key] = self._captured(sources, arguments, bases, self._before[key][1])
        return self._replayed(self._graphs[key], sources, trained)

    def _as_it_is(self, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """With the same launches as what will be captured: of a view, no later module knows what made it."""
        with shared_gradients(accumulate=True):
            y = self.module(x, *arguments)
        assert isinstance(y, Tensor)
        return y.view_as(y)

    def _captured(
        self,
        sources: list[Tensor],
        arguments: tuple[Any, ...],
        bases: dict[int, tuple[int, Tensor]],
        like: Tensor,
    ) -> _Graphs:
        """Graphs of a call, which take inputs from places of their own. Nothing is computed yet."""
        pool, device, count = self.pool, sources[0].device, len(sources)
        places = pool.room([*sources, sources[0], like, like])
        filled, (dx, out, dout) = places[:count], places[count:]
        _fill(filled, sources)  # for captures that compute, as tests have them on a CPU
        grad = torch.is_grad_enabled()
        x = filled[0].detach().requires_grad_(grad and sources[0].requires_grad)
        placed = _with_tensors(arguments, lambda t: _placed(t, filled[1 + bases[id(_base(t))][0]], _base(t)))
        parameters = {name: _stand_in(p) for name, p in self._parameters.items()}

        def forward() -> Tensor:
            names: dict[Tensor, Tensor] = dict(
                zip(self._parameters.values(), parameters.values(), strict=True)
            )
            with _autocast_as_it_is(device), shared_gradients(accumulate=True), standing_in(names):
                y = functional_call(self.module, parameters, (x, *placed))
            out.copy_(y.detach())
            return y

        def backward() -> None:
            wanted = [t for t in (x, *parameters.values()) if t.requires_grad]
            with without_autocast(device):
                found = torch.autograd.grad(y, wanted, dout, allow_unused=True)
            pairs = [(t.grad, g) for t, g in zip(wanted, found, strict=True) if g is not None and t is not x]
            if pairs:
                torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
            if x.requires_grad:
                dx.copy_(found[0])

        launch, y = pool.capture(forward)
        if not y.requires_grad:
            return _Graphs(filled, out, None, None, launch, None)
        launch_backward, _ = pool.capture(backward)
        return _Graphs(filled, out, dout, dx if x.requires_grad else None, launch, launch_backward)

    def _replayed(self, graphs: _Graphs, sources: list[Tensor], trained: Sequence[Tensor]) -> Tensor:
        _fill(graphs.filled, sources)
        self.pool.turn = turn = object()
        graphs.forward()
        if graphs.backward is None:
            return graphs.out.detach()
        # DDP reduces a gradient once autograd has reached the parameter wherever it was used.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        reached = trained if distributed or not sources[0].requires_grad else []
        return _Replay.apply(sources[0], _Call(graphs, self.pool, turn, trained), *reached)


class _Call(NamedTuple):
    """A replayed forward: its pool had this turn."""

    graphs: _Graphs
    pool: GraphPool
    turn: object
    trained: Sequence[Tensor]


class _Replay(torch.autograd.Function):
    """What autograd knows of a replayed forward; its backward is replayed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *reached: Tensor) -> Tensor:
        ctx.call, ctx.gradients = call, _gradients(call.trained)
        return call.graphs.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        graphs, pool, turn, trained = ctx.call
        if pool.turn is not turn:
            raise RuntimeError(
                "GraphedModule: expected one backward of a call, before the next call with its pool, got a "
                "later one"
            )
        if _gradients(trained) != ctx.gradients:
            raise RuntimeError(
                "GraphedModule: expected .grad of parameters where they were in forward, got others; zero "
                "them before the forward, or with zero_grad(set_to_none=False)"
            )
        pool.turn = None
        graphs.dout.copy_(dout)
        graphs.backward()
        dx = None if graphs.dx is None else graphs.dx.detach()
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def _gradients(parameters: Iterable[Tensor]) -> list[int]:
    """Where they lie."""
    return [0 if p.grad is None else p.grad.data_ptr() for p in parameters]


@torch.no_grad()
def _fill(places: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for place, source in zip(places, sources, strict=True):
        place.copy_(source)


def _stand_in(parameter: Tensor) -> Tensor:
    """Another tensor in the same memory, with the same gradient."""
    alias = parameter.detach().requires_grad_(parameter.requires_grad)
    alias.grad = parameter.grad
    return alias


def _autocast_as_it_is(device: torch.device) -> AbstractContextManager[object]:
    """Without its cache, which would keep what lies in the memory of graphs."""
    kind = device.type
    if kind == "meta":  # which has none
        return nullcontext()
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _base(tensor: Tensor) -> Tensor:
    """What it is a view of, if that has the same dtype; copies of it have views of the same alignment."""
    base = tensor._base
    return tensor if base is None or base.dtype != tensor.dtype else base


def _placed(tensor: Tensor, place: Tensor, base: Tensor) -> Tensor:
    """The same view of the place of its base."""
    offset = place.storage_offset() + tensor.storage_offset() - base.storage_offset()
    return place.as_strided(tensor.shape, tensor.stride(), offset)


def _form(value: Any, bases: dict[int, tuple[int, Tensor]]) -> Hashable:
    """A value without its tensors' values; what these are views of is added, by id, with a number."""
    if isinstance(value, Tensor):
        base = _base(value)
        number, _ = bases.setdefault(id(base), (len(bases), base))
        offset = value.storage_offset() - base.storage_offset()
        return number, value.shape, value.stride(), offset, value.dtype
    if dataclasses.is_dataclass(value):
        value = tuple(vars(value).values())
    return tuple(_form(part, bases) for part in value) if isinstance(value, list | tuple) else value


def _with_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """A value with other tensors."""
    if isinstance(value, Tensor):
        return replace(value)
    if dataclasses.is_dataclass(value):
        parts = {name: _with_tensors(part, replace) for name, part in vars(value).items()}
        return dataclasses.replace(value, **parts)  # type: ignore[type-var]
    if isinstance(value, list | tuple):
        parts_of = [_with_tensors(part, replace) for part in value]
        return type(value)(*parts_of) if hasattr(value, "_fields") else type(value)(parts_of)
    return value
