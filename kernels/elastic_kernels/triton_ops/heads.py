"""Rows of one head as tiles of `BLOCK_D` columns: matrix units take 16 and more, `tl.arange` powers of two.

Columns from `HEAD_DIM` on read as zeros, which add nothing to a product over channels. Where a head fills its
tile there is no mask of columns in the compiled code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elastic_kernels.triton_ops.device import next_power_of_2


def head_block(head_dim: int) -> int:
    """`BLOCK_D`: columns of the tiles of a head."""
    return max(next_power_of_2(head_dim), 16)


@triton.jit
def of_head(mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mask of rows as one of elements, `[rows, BLOCK_D]` or `[rows, 1]`."""
    mask = mask[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_head(base, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The `[BLOCK_D]` values of one row."""
    offs_d = tl.arange(0, BLOCK_D)
    if BLOCK_D == HEAD_DIM:
        x = tl.load(base + offs_d)
    else:
        x = tl.load(base + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    return x
