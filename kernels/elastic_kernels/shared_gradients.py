"""One gradient of a weight that several networks use in one graph.

A narrow network's weight gradient is a corner. Left to autograd it becomes a full-size tensor of mostly zeros
that is added to the widest network's; here the corner itself waits, and is added in place. So does the whole
gradient of a network as wide, to which the product of the next one is added. Products can also add to the
gradient that an earlier backward left in `.grad`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

from elastic_kernels.dispatch import holding


class GradientLedger:
    """Gradients that wait for that of the whole weight, of one graph; weights are known by `id`.

    If it `accumulates`, gradients may be added to those in `.grad`.
    """

    def __init__(self, accumulates: bool = False) -> None:
        self.accumulates = accumulates
        self._whole: Counter[int] = Counter()  # uses of whole weights whose backward is to come
        self._waiting: dict[int, tuple[Tensor | None, ...]] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the same id

    def expect(self, weight: Tensor) -> None:
        """A whole weight is used, and its gradient will come."""
        self._whole[id(weight)] += 1
        self._alive.append(weight)

    def arrived(self, weight: int) -> tuple[Tensor | None, ...] | None:
        """A whole gradient comes: what waits to be added to it and to those that come with it."""
        self._whole[weight] -= 1
        return self._waiting.pop(weight, None)

    def awaits_whole(self, weight: int) -> bool:
        """Whether a gradient may wait: a whole one is to come, and no other waits."""
        return self._whole[weight] > 0 and weight not in self._waiting

    def leave(self, weight: int, *gradients: Tensor | None) -> None:
        """Let gradients wait until the end of this backward: a weight's, perhaps of a corner alone, and whole
        ones of the vectors beside it."""
        if not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self._require_none)
        self._waiting[weight] = gradients

    def _require_none(self) -> None:
        if self._waiting:
            count = len(self._waiting)
            self._waiting.clear()
            raise RuntimeError(
                f"shared_gradients: expected every pass to be part of the loss, got {count} weights whose "
                "whole gradient never came; that of other passes would be lost"
            )


_ledger: ContextVar[GradientLedger | None] = ContextVar("shared_gradients", default=None)


def earlier_gradients(parameters: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """What `.grad` of a layer's parameters has, if that of each that there is can be added to in place."""
    gradients = [None if p is None or not p.is_leaf else p.grad for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        if p is not None and (gradient is None or gradient.dtype != p.dtype or not gradient.is_contiguous()):
            return None
    return gradients


def shared_gradients(*, accumulate: bool = False) -> AbstractContextManager[None]:
    """Run several networks on the same weights whose losses are differentiated together.

    Among the forward passes in this context, each lets the gradient of a weight be added in place to that of
    a pass that uses all of it, if that comes later in backward, as autograd does for a pass that was run
    earlier: so run the widest network first. In any other order, with `recompute` and without Triton,
    gradients are added by autograd; they are the same up to rounding.

    Args:
        accumulate: the backward is `loss.backward()`, which may add gradients of layers to those in `.grad`
            in place: no memory and no pass is needed for them, and hooks of the parameters see none.

    Every pass must be part of the loss: a backward that leaves out a wide pass, for whose gradients those of
    others wait, ends in a RuntimeError.

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
    return holding(_ledger, GradientLedger(accumulate))


def stop_sharing() -> None:
    """Let autograd add the gradients of what runs from here on in this context."""
    _ledger.set(None)


def current_ledger() -> GradientLedger | None:
    """That of the context, if there is one; none where `torch.compile` traces."""
    return None if torch.compiler.is_compiling() else _ledger.get()
