"""Weights in the dtype of the products: rounded once for many products instead of for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from elastic_kernels import dispatch

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.folding import Table


class Copy(NamedTuple):
    """What products read instead of a layer's weight.

    Attributes:
        weight: in half precision, of the weight's shape.
        gamma: LayerScale, if weight and bias have it as a factor.
        bias: of the layer times gamma, fp32; None without a bias or gamma.
    """

    weight: Tensor
    gamma: Tensor | None = None
    bias: Tensor | None = None


_current: ContextVar[dict[int, Copy] | None] = ContextVar("working_weights", default=None)


class working_weights:  # noqa: N801, used as a function, like torch.no_grad
    """Round weights once, for all Triton products that read them while the context lasts.

    On entry every weight is rounded, so that no product reads an old one, whatever changed it; but those are
    not that an optimiser has just written rounded (see `FusedAdamW.writing`). Products in the context use the
    weights as they were on entry. Without the context each product rounds its own, to the
    same bits. (A library may sum the product of a corner in another order than that of a compact matrix.) A
    backward of such products must come before the context is entered again, or PyTorch refuses it. Under
    `torch.compile` rounded weights are not read.

    Where LayerScale follows a layer, its factors may be folded into the layer's weight and bias: products
    then do without them, in both directions, and gradients are those of the parameters as before.

    Args:
        weights: floating point, kept alive by this object, which may be entered any number of times. Biases
            may be among them, for plain products; fused ones take them in fp32.
        dtype: float16 or bfloat16.
        scaled: other layers as (weight, bias or None, gamma), contiguous float32; read with that gamma only.

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

    def __init__(
        self,
        weights: Iterable[Tensor],
        dtype: torch.dtype,
        scaled: Iterable[tuple[Tensor, Tensor | None, Tensor]] = (),
    ):
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"working_weights: expected float16 or bfloat16, got {dtype}")
        self._dtype, self._weights, self._scaled = dtype, list(weights), list(scaled)
        for tensor in (t for layer in self._scaled for t in layer if t is not None):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise TypeError(
                    "working_weights: expected layers with LayerScale in contiguous float32, "
                    f"got {tensor.dtype}, strides {tensor.stride()}"
                )
        self._rounded = self._copies(self._weights)
        self._folded = self._copies([weight for weight, _, _ in self._scaled])
        self._biases = [None if bias is None else torch.empty_like(bias) for _, bias, _ in self._scaled]
        self._table: Table | None = None
        self._written: dict[int, tuple[Tensor, int]] = {}  # alias of a weight, and its version
        self._tokens: list[Token[dict[int, Copy] | None]] = []

    def _copies(self, weights: Iterable[Tensor]) -> list[Tensor]:
        contiguous = torch.contiguous_format
        return [
            torch.empty_like(w, dtype=self._dtype, memory_format=contiguous, requires_grad=False)
            for w in weights
        ]

    @torch.no_grad()
    def __enter__(self) -> working_weights:
        pairs = zip(self._rounded, self._weights, strict=True)
        if stale := [pair for pair in pairs if not self._is_written(pair[1])]:
            rounded, weights = zip(*stale, strict=True)
            torch._foreach_copy_(list(rounded), list(weights))
        mine = {id(w): Copy(rounded) for w, rounded in zip(self._weights, self._rounded, strict=True)}
        if self._scaled and dispatch.choose("working_weights", self._folded[0]).backend == "triton":
            mine |= self._fold()
        self._tokens.append(_current.set((_current.get() or {}) | mine))
        return self

    def places(self) -> dict[Tensor, Tensor]:
        """Where the weights without LayerScale are rounded to, by weight."""
        return dict(zip(self._weights, self._rounded, strict=True))

    def note_written(self, aliases: Mapping[Tensor, Tensor]) -> None:
        """These weights are rounded to their places as they are now, and no others.

        Args:
            aliases: of the weights; as long as they are kept, other tensors lie at other addresses.
        """
        self._written = {id(w): (alias, w._version) for w, alias in aliases.items()}

    def forget(self) -> None:
        """Round all weights on entry again."""
        self._written = {}

    def _is_written(self, weight: Tensor) -> bool:
        """Whether PyTorch saw no change since it was noted, nor other data."""
        if (noted := self._written.get(id(weight))) is None:
            return False
        alias, version = noted
        return (
            weight._version == version
            and weight.data_ptr() == alias.data_ptr()
            and weight.shape == alias.shape
            and weight.stride() == alias.stride()
        )

    def _fold(self) -> dict[int, Copy]:
        from elastic_kernels.triton_ops import folding
        from elastic_kernels.triton_ops.registration import ops

        weights, biases, gammas = zip(*self._scaled, strict=True)
        addresses = folding.addresses_of(weights, gammas, self._folded)
        if self._table is None or self._table.addresses != addresses:
            self._table = folding.table_of(weights, addresses)
        ops.fold_layer_scale(self._folded, self._table.tensors, self._table.tiles, self._table.aligned)
        torch.autograd.graph.increment_version(self._folded)  # which the kernel found by their addresses
        if there := [row for row in zip(self._biases, biases, gammas, strict=True) if row[1] is not None]:
            products, plain, factors = map(list, zip(*there, strict=True))
            torch._foreach_copy_(products, plain)
            torch._foreach_mul_(products, factors)
        copies = map(Copy, self._folded, gammas, self._biases)
        return {id(w): copy for w, copy in zip(weights, copies, strict=True)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._tokens.pop())


def working_copy(weight: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Copy:
    """The weight as the context has it in a dtype, without gamma or with just this one; else itself."""
    copy = None if torch.compiler.is_compiling() else (_current.get() or {}).get(id(weight))
    if copy is None or copy.weight.dtype != dtype or not (copy.gamma is None or copy.gamma is gamma):
        return Copy(weight)
    return copy


def current_copies(weights: Iterable[Tensor]) -> list[Tensor]:
    """What products in the context read instead of these weights."""
    copies = _current.get() or {}
    found = (copies[id(w)] for w in weights if id(w) in copies)
    return [t for copy in found for t in (copy.weight, copy.bias) if t is not None]


def standing_in(names: Mapping[Tensor, Tensor]) -> AbstractContextManager[None]:
    """Let other tensors stand for weights: by weight, the one whose products read the weight's copy."""
    copies = _current.get() or {}
    mine = {
        id(other): copy._replace(gamma=None if copy.gamma is None else names.get(copy.gamma, copy.gamma))
        for weight, other in names.items()
        if (copy := copies.get(id(weight)))
    }
    return dispatch.holding(_current, copies | mine)
