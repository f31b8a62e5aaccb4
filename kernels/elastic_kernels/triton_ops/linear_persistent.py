"""Persistent programs of linear layers: so many for each processor, which make tile after tile.

Forward, or back through the layer and the activation before it, with the epilogues of `linear_epilogues.py`.
Tensor descriptors load the operands, those of the next tile while a tile is in its epilogue.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import capability, processors
from elastic_kernels.triton_ops.gemm import TWO_BLOCKS, GemmConfig, dot, slices_of, tile_of
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.linear_epilogues import finish_backward, finish_forward


@launched("rows")
def _linear_persistent_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, u_ptr, residual_ptr, gamma_ptr, index_ptr, row_scale_ptr,
    act_ptr, sums_ptr,
    rows, columns, inner,
    stride_x, stride_w, stride_y, stride_r,
    scale,
    BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y from x and one matrix `[columns, inner]`, or `BACKWARD` dx from dy and one `[inner, columns]`."""
    x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, inner], [stride_x, 1], [BLOCK_M, BLOCK_K])
    if BACKWARD:
        w_tiles = tl.make_tensor_descriptor(weight_ptr, [inner, columns], [stride_w, 1], [BLOCK_K, BLOCK_N])
    else:
        w_tiles = tl.make_tensor_descriptor(weight_ptr, [columns, inner], [stride_w, 1], [BLOCK_N, BLOCK_K])
    tl.assume(inner > 0)  # else there is code for tiles without a product, too
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, inner, BLOCK_K):
            x = x_tiles.load([pid_m * BLOCK_M, start])
            if BACKWARD:
                w = w_tiles.load([start, pid_n * BLOCK_N])
            else:
                w = w_tiles.load([pid_n * BLOCK_N, start]).T
            acc = dot(x, w, acc, PRECISION)
        slices = slices_of(acc * scale, BLOCK_M, BLOCK_N, 32)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m, column = offs_m < rows, pid_n * BLOCK_N
        COLUMNS: tl.constexpr = BLOCK_N // len(slices)
        if BACKWARD:
            finish_backward(
                slices, u_ptr, y_ptr, act_ptr, sums_ptr, pid_m, offs_m, mask_m, column, columns,
                EPILOGUE, COLUMNS, BLOCK_N > 128,
            )  # fmt: skip
        else:
            finish_forward(
                slices, bias_ptr, y_ptr, u_ptr, residual_ptr, gamma_ptr, index_ptr, row_scale_ptr,
                offs_m, mask_m, column, columns, stride_y, stride_r,
                HAS_BIAS, EPILOGUE, HAS_GAMMA, HAS_INDEX, HAS_ROW_SCALE, COLUMNS, BLOCK_N > 128,
            )  # fmt: skip


def launch_persistent(config: GemmConfig, tiles: int, x: Tensor, *arguments: Any, **flags: Any) -> None:
    """Launch the kernel for so many tiles, with its arguments after `x` and its compile-time flags."""
    context = copy_context()  # the program may have an allocator of its own
    context.run(triton.set_allocator, _scratch)
    programs = min(tiles, config.persistent * processors(x.device))
    if config.persistent > 1 and capability(x.device) == (9, 0):  # on others it would spill
        flags["maxnreg"] = TWO_BLOCKS
    context.run(_linear_persistent_kernel[(programs,)], x, *arguments, **flags)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current device for the descriptors of a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
