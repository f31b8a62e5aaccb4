"""Weights in the dtype of the products: rounded once for many products instead of for each."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar, Token
from types import TracebackType

import torch
from torch import Tensor

_current: ContextVar[dict[int, Tensor] | None] = ContextVar("working_weights", default=None)


class working_weights:  # noqa: N801, used as a function, like torch.no_grad
    """Round weights once, for all Triton products that read them while the context lasts.

    On entry every weight is rounded, so that no product reads an old one, whatever changed it; products in
    the context use the weights as they were on entry. Without the context each product rounds its own, to the
    same bits. (A library may sum the product of a corner in another order than that of a compact matrix.) A
    backward of such products must come before the context is entered again, or PyTorch refuses it. Under
    `torch.compile` rounded weights are not read.

    Args:
        weights: floating point, kept alive by this object, which may be entered any number of times.
        dtype: float16 or bfloat16.

    Raises:
        TypeError: another dtype.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_linear, working_weights
        >>> layer, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
        >>> rounded = working_weights([layer.weight], torch.bfloat16)
        >>> with rounded, torch.autocast("cpu", torch.bfloat16):
        ...     elastic_linear(x, layer.weight, layer.bias).dtype
        torch.bfloat16
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype):
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"working_weights: expected float16 or bfloat16, got {dtype}")
        self._weights = list(weights)
        contiguous = torch.contiguous_format
        self._rounded = [
            torch.empty_like(w, dtype=dtype, memory_format=contiguous, requires_grad=False)
            for w in self._weights
        ]
        self._tokens: list[Token[dict[int, Tensor] | None]] = []

    @torch.no_grad()
    def __enter__(self) -> working_weights:
        if self._weights:
            torch._foreach_copy_(self._rounded, self._weights)
        mine = {id(w): rounded for w, rounded in zip(self._weights, self._rounded, strict=True)}
        self._tokens.append(_current.set((_current.get() or {}) | mine))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.reset(self._tokens.pop())


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the context rounded it to a dtype, if it did; else the weight itself."""
    if torch.compiler.is_compiling():
        return weight
    rounded = (_current.get() or {}).get(id(weight))
    return weight if rounded is None or rounded.dtype != dtype else rounded
