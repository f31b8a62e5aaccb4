"""One gradient of a weight that several networks use in one graph.

A narrow network's weight gradient is a corner. Left to autograd it becomes a full-size tensor of mostly zeros
that is added to the widest network's; here the corner itself waits, and is added in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class GradientLedger:
    """Corners that wait for the gradient of the whole weight, of one graph; weights are known by `id`."""

    def __init__(self) -> None:
        self._whole: Counter[int] = Counter()  # uses of whole weights whose backward is to come
        self._corners: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the same id

    def expect(self, weight: Tensor) -> None:
        """A whole weight is used, and its gradient will come."""
        self._whole[id(weight)] += 1
        self._alive.append(weight)

    def awaits_whole(self, weight: int) -> bool:
        """Whether a corner may wait: the whole gradient is to come, and no other corner waits."""
        return self._whole[weight] > 0 and weight not in self._corners

    def leave(self, weight: int, corner: Tensor) -> None:
        """Let a corner `[groups, n, k]` wait, until the end of this backward."""
        if not self._corners:
            torch.autograd.Variable._execution_engine.queue_callback(self._require_none)
        self._corners[weight] = corner

    def complete(self, weight: int, whole: Tensor) -> None:
        """Add the corner that waits, if any, to the gradient `[groups, n_max, k_max]` of a whole weight."""
        self._whole[weight] -= 1
        corner = self._corners.pop(weight, None)
        if corner is not None:
            _, out, width = corner.shape
            whole[:, :out, :width].add_(corner)

    def _require_none(self) -> None:
        if self._corners:
            count = len(self._corners)
            self._corners.clear()
            raise RuntimeError(
                f"shared_gradients: expected every pass to be part of the loss, got {count} weights whose "
                "gradient came of narrow passes alone; it would be lost"
            )


_ledger: ContextVar[GradientLedger | None] = ContextVar("shared_gradients", default=None)


@contextmanager
def shared_gradients() -> Iterator[None]:
    """Run several networks on the same weights whose losses are differentiated together.

    Among the forward passes in this context, those that use only a corner of a weight let its gradient be
    added in place to that of a pass that uses all of it, if that comes later in backward, as autograd does
    for a pass that was run earlier: so run the widest network first. In any other order, with `recompute`
    and without Triton, gradients are added by autograd; they are the same bits.

    Every pass must be part of the loss: a backward that leaves out a wide pass, for whose gradients those of
    narrow ones wait, ends in a RuntimeError.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, shared_gradients
        >>> block, x = ElasticBlock(64, 256, 16), torch.randn(10, 64)
        >>> with shared_gradients():
        ...     wide, narrow = block(x, [(2, 5)]), block(x[:, :32], [(2, 5)])
        >>> (wide.sum() + narrow.sum()).backward()
        >>> block.mlp.fc1.weight.grad.shape
        torch.Size([256, 64])
    """
    token = _ledger.set(GradientLedger())
    try:
        yield
    finally:
        _ledger.reset(token)


def stop_sharing() -> None:
    """Let autograd add the gradients of what runs from here on in this context."""
    _ledger.set(None)


def current_ledger() -> GradientLedger | None:
    """That of the context, if there is one; none where `torch.compile` traces."""
    return None if torch.compiler.is_compiling() else _ledger.get()
