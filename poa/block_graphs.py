"""Blocks of ViTs replayed as CUDA graphs while a run trains, where the host would limit its speed.

All active blocks but the last are one graph: the last makes the tokens that are read, whose number varies.
What the others launch, forward and backward, can be captured: kernels of Triton, cuBLAS and PyTorch on the
current stream. None of them copies from the host, waits for the device, or is chosen by values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kernels import GraphedModule, GraphPool
from poa.errors import InputError


class BlockRun(nn.Module):
    """Blocks one after the other, on packed tokens `[tokens, w]`."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, groups: Any, kept: Sequence[Any], rotary: Any) -> Tensor:
        """`kept` is of each block; the rest is of `ElasticBlock`."""
        for number, (block, pair) in enumerate(zip(self.blocks, kept, strict=True)):
            inplace = number > 0 or not x.requires_grad  # as autograd has it of a leaf
            x = block(x, groups, pair, inplace=inplace, rotary=rotary)
        return x


class BlockGraphs:
    """The graphs of all networks and subnets of a run. Raises InputError: as `require_graphs`."""

    def __init__(self, device: torch.device, pool: GraphPool | None = None):
        self._pool = pool or GraphPool()
        require_graphs(device, self._pool)
        self._runs: dict[tuple[int, ...], GraphedModule] = {}

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *arguments: Any) -> Tensor:
        """The tokens after these blocks; see `BlockRun.forward`."""
        key = tuple(map(id, blocks))
        if key not in self._runs:
            self._runs[key] = GraphedModule(BlockRun(blocks), self._pool)
        return self._runs[key](x, *arguments)


def require_graphs(device: torch.device, pool: GraphPool | None = None) -> None:
    """Raise InputError unless it is of the kind that has graphs."""
    kind = (pool or GraphPool).device_type
    if device.type != kind:
        raise InputError(f"performance.cuda_graphs: expected a {kind} device, got run.device {device}")


_current: ContextVar[BlockGraphs | None] = ContextVar("block_graphs", default=None)


@contextmanager
def replaying(graphs: BlockGraphs | None) -> Iterator[None]:
    """While it lasts, `graphs` are what ViTs replay; None: they do not."""
    token = _current.set(graphs)
    try:
        yield
    finally:
        _current.reset(token)


def current_graphs() -> BlockGraphs | None:
    return _current.get()
