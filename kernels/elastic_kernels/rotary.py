"""Rotary position embedding of queries and keys, per head and independent of the width.

    x' = x * cos + rotate(x) * sin

`rotate` turns pairs of channels by a quarter: neighbours (2i, 2i + 1), or halves (i, i + d / 2). The angles
belong to tokens, so that prefixes of heads share them. Source: Su et al., 2021; in two dimensions as in
timm's EVA and DINOv3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Sines and cosines of the angles of every packed token.

    Attributes:
        sin, cos: `[tokens, head_dim]`; rows of class tokens and registers are 0 and 1.
        halves: pairs are (i, i + d / 2); otherwise neighbours.

    Example:
        >>> import torch
        >>> from elastic_kernels import Rotary
        >>> rotary = Rotary.of_grid(2, 3, head_dim=16, prefix=1)
        >>> qkv = torch.randn(7, 3, 4, 16)  # one sequence of a class token and 2x3 patches
        >>> bool((rotary.turn(qkv)[:, 2] == qkv[:, 2]).all())  # values are not turned
        True
    """

    sin: Tensor
    cos: Tensor
    halves: bool = False

    @classmethod
    def of_sequences(
        cls, sin: Tensor, cos: Tensor, *, prefix: int = 0, count: int = 1, halves: bool = False
    ) -> Rotary:
        """Angles `[patches, head_dim]` of each of `count` sequences, after `prefix` tokens without any."""
        parts = sin.new_zeros(prefix, sin.shape[1]), cos.new_ones(prefix, cos.shape[1])
        sin, cos = (torch.cat([part, t]).repeat(count, 1) for part, t in zip(parts, (sin, cos), strict=True))
        return cls(sin, cos, halves)

    @classmethod
    def of_grid(
        cls,
        height: int,
        width: int,
        head_dim: int,
        *,
        prefix: int = 0,
        count: int = 1,
        temperature: float = 10_000.0,
        device: torch.device | str | None = None,
    ) -> Rotary:
        """Angles of the patches of images: rows turn the first half of the pairs, columns the second.

        Raises:
            ValueError: `head_dim` is no multiple of 4.
        """
        if head_dim % 4:
            raise ValueError(f"Rotary: expected head_dim a multiple of 4, got {head_dim}")
        steps = torch.arange(head_dim // 4, dtype=torch.float64, device=device) / (head_dim // 4)
        rows, columns = (torch.arange(n, dtype=torch.float64, device=device) for n in (height, width))
        grid = torch.cartesian_prod(rows, columns).unsqueeze(-1) * temperature**-steps
        angles = grid.flatten(1).repeat_interleave(2, 1)
        return cls.of_sequences(angles.sin().float(), angles.cos().float(), prefix=prefix, count=count)

    def rows(self, rows: Tensor) -> Rotary:
        """Of some of the tokens."""
        return Rotary(self.sin.index_select(0, rows), self.cos.index_select(0, rows), self.halves)

    def check(self, qkv: Tensor) -> None:
        """Raise ValueError unless there are angles of all tokens and channels of a head."""
        if self.sin.shape != (qkv.shape[0], qkv.shape[3]) or self.cos.shape != self.sin.shape:
            raise ValueError(
                f"Rotary: expected sin and cos {[qkv.shape[0], qkv.shape[3]]}, got {list(self.sin.shape)} "
                f"and {list(self.cos.shape)}"
            )
        if self.sin.device != qkv.device or self.cos.device != qkv.device:
            raise ValueError(f"Rotary: expected sin and cos on {qkv.device}, got {self.sin.device}")

    def turn(self, qkv: Tensor) -> Tensor:
        """Turn queries and keys of `[tokens, 3, heads, head_dim]`; in fp32 if the angles are.

        This is the plain definition; `qk_norm` has a kernel.
        """
        self.check(qkv)
        x = qkv[:, :2]
        if self.halves:
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        sin, cos = (t.view(t.shape[0], 1, 1, t.shape[1]) for t in (self.sin, self.cos))
        return torch.cat([(x * cos + turned * sin).to(qkv.dtype), qkv[:, 2:]], 1)
