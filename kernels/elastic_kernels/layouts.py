"""Which packed tokens attend to each other, and which of them take part in half of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from elastic_kernels import dispatch
from elastic_kernels.attention import Groups, attention_backend, class_sizes, packed_attention
from elastic_kernels.qk_norm import qk_norm
from elastic_kernels.rotary import Rotary
from elastic_kernels.window_attention import (
    MASK_VALUE,
    validate_windows,
    window_attention,
    window_attention_backend,
)

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.halves import WindowSpec


@dataclass(frozen=True)
class KeptRows:
    """The sequences that take part in a half-block; the others pass it by unchanged (stochastic depth).

    Attributes:
        groups: `(kept sequences, length)` of each length class.
        rows: int64 `[kept tokens]`, their distinct positions in the packed tensor.
        scale: float32 `[kept tokens]`, the inverse of the keep rate of each row.
        places: int32 `[tokens]`, where each packed token stands among the kept ones, -1 for the others; found
            when it is needed if None.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, KeptRows
        >>> block, x = ElasticBlock(32, 128, 16), torch.randn(6, 32)  # two sequences of 3 tokens
        >>> second = KeptRows(((1, 3),), torch.tensor([3, 4, 5]), torch.full((3,), 2.0))
        >>> block(x, [(2, 3)], kept=(second, second))[:3].equal(x[:3])
        True
    """

    groups: tuple[tuple[int, int], ...]
    rows: Tensor
    scale: Tensor
    places: Tensor | None = None

    def among(self, only: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Where the tokens `only` (int64 `[live]`) stand among the kept ones, and their factors.

        A token that is not kept stands anywhere, with the factor 0. Nothing waits for the device.
        """
        places = places_of(self.rows, tokens) if self.places is None else self.places
        place = places.index_select(0, only)
        anywhere = place.clamp(min=0)
        scale = self.scale if len(self.scale) else self.scale.new_zeros(1)
        return anywhere, scale.index_select(0, anywhere) * (place >= 0)


def places_of(rows: Tensor, tokens: int) -> Tensor:
    """The inverse of a choice of rows of so many tokens: int32 `[tokens]`, -1 for the others."""
    places = torch.full((tokens,), -1, dtype=torch.int32, device=rows.device)
    places[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return places


class Layout(Protocol):
    """How packed tokens attend: `Sequences` or `Windows`."""

    def kept(self, kept: KeptRows) -> Layout:
        """The layout of the rows that take part."""

    def sizes(self) -> list[int] | None:
        """Tokens of each group; None where only the device knows."""

    def backend(self, x: Tensor, head_dim: int) -> dispatch.Choice:
        """The backend of attention for products of `x`, and why."""

    def attend(self, qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
        """`[tokens, 3, heads, head_dim]` -> `[tokens, heads * head_dim]`."""

    @property
    def is_fused(self) -> bool:
        """Whether an attention half with it can be one call for autograd."""

    def spec(self, heads: int) -> tuple[list[int], WindowSpec | None, Tensor | None]:
        """Flat sizes of the groups, and of windows what the kernel takes and their bias."""


@dataclass(frozen=True)
class Sequences:
    """Sequences, each attending within itself.

    Attributes:
        groups: `(count, length)` of each length class in packing order, or offsets, as of `packed_attention`.
        rotary: angles of all tokens, by which queries and keys are turned; None: by none.

    Example:
        >>> from elastic_kernels import Sequences
        >>> Sequences([(2, 197), (8, 37)]).sizes()
        [394, 296]
    """

    groups: Groups
    rotary: Rotary | None = None

    def kept(self, kept: KeptRows) -> Sequences:
        return Sequences(kept.groups, None if self.rotary is None else self.rotary.rows(kept.rows))

    def sizes(self) -> list[int] | None:
        if isinstance(self.groups, Tensor):
            return None
        return class_sizes(self.groups)

    def backend(self, x: Tensor, head_dim: int) -> dispatch.Choice:
        return attention_backend(x, self.groups, head_dim, dispatch.product_dtype(x))

    def attend(self, qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
        turned = qkv if self.rotary is None else qk_norm(qkv, rotary=self.rotary)
        return packed_attention(turned, self.groups)

    @property
    def is_fused(self) -> bool:
        return self.rotary is None

    def spec(self, heads: int) -> tuple[list[int], WindowSpec | None, Tensor | None]:
        assert not isinstance(self.groups, Tensor)
        return [number for group in self.groups for number in group], None, None


@dataclass(frozen=True)
class Windows:
    """Maps whose tokens attend within windows, which are padded with zeros before qkv (Swin).

    Attributes:
        maps: `(count, height, width)` of each group in packing order.
        size, shift: of the windows, in tokens, as of `window_attention`.
        bias: `[heads_max, n, n]`, n = size**2, as of `window_attention`.

    Example:
        >>> import torch
        >>> from elastic_kernels import Windows
        >>> Windows([(2, 14, 14)], size=7, shift=3, bias=torch.zeros(4, 49, 49)).sizes()
        [392]
    """

    maps: Sequence[tuple[int, int, int]]
    size: int
    shift: int
    bias: Tensor

    def kept(self, kept: KeptRows) -> Windows:
        counts = zip(kept.groups, self.maps, strict=True)
        maps = [(count, height, width) for (count, _), (_, height, width) in counts]
        return Windows(maps, self.size, self.shift, self.bias)

    def sizes(self) -> list[int]:
        return [count * height * width for count, height, width in self.maps]

    def backend(self, x: Tensor, head_dim: int) -> dispatch.Choice:
        return window_attention_backend(x, self.size, head_dim, dispatch.product_dtype(x))

    def attend(self, qkv: Tensor, qkv_bias: Tensor | None) -> Tensor:
        pad = None if qkv_bias is None else qkv_bias.view(3, -1, qkv.shape[-1])
        return window_attention(qkv, self.bias, pad, self.maps, window=self.size, shift=self.shift)

    @property
    def is_fused(self) -> bool:
        return True

    def spec(self, heads: int) -> tuple[list[int], WindowSpec | None, Tensor | None]:
        from elastic_kernels.triton_ops.halves import WindowSpec

        validate_windows("elastic_attention_half", heads, self.bias, self.size, self.shift)
        flat = [number for group in self.maps for number in group]
        return flat, WindowSpec(self.size, self.shift, MASK_VALUE), self.bias
