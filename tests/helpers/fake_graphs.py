"""CUDA graphs without a GPU: a capture records every operator, a replay runs them again on the same tensors.

It refuses what a GPU would: waiting for values, and reading what lies elsewhere than in the memory of graphs,
in weights and in gradients. What a capture wrote is taken back, as a GPU only notes launches. The memory that
graphs share holds NaN but from the replay of a forward to the end of its backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_kernels import GraphPool
from helpers.launches import FREE, WAITS
from poa import block_graphs
from poa.step import TrainingState

T = TypeVar("T")


def tensors(value: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(value) if isinstance(t, Tensor))


def place(tensor: Tensor) -> int:
    """Of its memory, as long as that is alive."""
    return tensor.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """The operators of a capture, which may use what the one before made."""

    def __init__(self, before: Recording | None, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        self.follows = False  # uses what the one before made
        self.before = before
        self.outside = {place(t) for t in outside}
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.__name__.partition(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        for tensor in tensors((args, kwargs)):
            self.require_held(tensor, name)
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                self.keep(value)
        self.keep(kwargs.get("out"))
        outputs = function(*args, **kwargs)
        given = {place(t) for t in tensors((args, kwargs))}
        for tensor in tensors(outputs):
            if place(tensor) not in given:
                self.made[place(tensor)] = tensor
        if not function.is_view and name not in FREE:
            self.calls.append((function, args, kwargs, outputs))
        return outputs

    def require_held(self, tensor: Tensor, name: str) -> None:
        if self.before and place(tensor) in self.before.made:
            self.follows = True
        elif place(tensor) not in self.outside and place(tensor) not in self.made:
            raise AssertionError(f"{name} reads {tuple(tensor.shape)} {tensor.dtype}, which nobody holds")

    def keep(self, value: Any) -> None:
        """Note what memory outside held before it is written."""
        for tensor in tensors(value):
            if place(tensor) in self.outside and place(tensor) not in self.written:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
                self.written[place(tensor)] = whole, whole.clone()

    def take_back(self) -> None:
        for whole, before in self.written.values():
            whole.copy_(before)
        self.written.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(outputs), tensors(again), strict=True):
                if place(old) != place(new):
                    old.copy_(new)

    def poison(self) -> None:
        for tensor in self.made.values():
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)


class FakePool(GraphPool):
    """A pool on the CPU."""

    device_type = "cpu"
    held: ClassVar[list[Callable[[], Iterable[Tensor]]]] = []  # weights, gradients and the like
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.recordings: list[Recording] = []
        self.last: Recording | None = None

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        held = [t for give in self.held for t in give()]
        arena = [] if self._arena is None else [self._arena]
        recording = Recording(self.recordings[-1] if self.recordings else None, [*held, *arena])
        self.counts["captures"] += 1
        with recording:
            result = work()
        recording.take_back()
        recording.poison()
        self.recordings.append(recording)
        return lambda: self.replay(recording), result

    def replay(self, recording: Recording) -> None:
        self.counts["replays"] += 1
        if recording.follows:
            assert self.last is recording.before, "another replay came between a forward and its backward"
        for other in self.recordings:
            if not (recording.follows and other is recording.before):
                other.poison()
        recording.replay()
        self.last = recording
        if recording.follows:
            for other in self.recordings:
                other.poison()


def held_by(state: TrainingState) -> Iterator[Tensor]:
    """What lies where it is for as long as a run lasts, and gradients, whose places are checked."""
    for network in (state.student, state.teacher):
        yield from network.parameters()
        yield from network.buffers()
        yield from (p.grad for p in network.parameters() if p.grad is not None)
    rounded = state.rounded
    yield from (*rounded._rounded, *rounded._folded, *(b for b in rounded._biases if b is not None))


def install(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let runs on the CPU use such graphs from here on."""
    start = TrainingState.start

    def started(*inputs: Any) -> TrainingState:
        state = start(*inputs)
        FakePool.held[:] = [lambda: held_by(state)]
        return state

    FakePool.counts.clear()
    patch(block_graphs, "GraphPool", FakePool)
    patch(TrainingState, "start", started)
