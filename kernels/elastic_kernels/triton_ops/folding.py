"""A Triton kernel that folds LayerScale into the weights of many layers at once, rounded for products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.dispatch import upload
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import register

ROWS, BLOCK = 4, 512  # of a weight that a program takes, and columns at a time: 16 values a thread


class Table(NamedTuple):
    """Where everything lies, on the device.

    Attributes:
        tensors: int64 `[5, layers]`, addresses of weight, gamma and result, then rows and columns.
        tiles: int32 `[programs, 2]`, numbers of a layer and of the first row.
        addresses: as in `tensors`, on the host.
        aligned: all addresses are multiples of 16 bytes, and columns of 16.
    """

    tensors: Tensor
    tiles: Tensor
    addresses: list[int]
    aligned: bool


@launched()
def _fold_kernel(
    weights_ptr, gammas_ptr, results_ptr, heights_ptr, widths_ptr, tiles_ptr,
    BF16: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of an fp32 weight times their gamma, in half precision."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    layer = tl.load(tiles_ptr + 2 * tl.program_id(0))
    offs_n = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) + tl.arange(0, ROWS)
    weight = tl.load(weights_ptr + layer).to(tl.pointer_type(tl.float32))
    result = tl.load(results_ptr + layer).to(tl.pointer_type(dtype))
    width, mask_n = tl.load(widths_ptr + layer), offs_n < tl.load(heights_ptr + layer)
    if ALIGNED:
        weight, result = tl.multiple_of(weight, 16), tl.multiple_of(result, 16)
        width = tl.multiple_of(width, 16)
    gamma = tl.load(gammas_ptr + layer).to(tl.pointer_type(tl.float32))
    gamma = tl.load(gamma + offs_n, mask=mask_n, other=0.0)
    rows = offs_n.to(tl.int64)[:, None] * width
    for start in range(0, width, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        mask = mask_n[:, None] & (offs_k < width)[None, :]
        w = tl.load(weight + rows + offs_k[None, :], mask=mask, other=0.0)
        tl.store(result + rows + offs_k[None, :], (w * gamma[:, None]).to(dtype), mask=mask)


def addresses_of(weights: Sequence[Tensor], gammas: Sequence[Tensor], results: Sequence[Tensor]) -> list[int]:
    """Where contiguous tensors lie now."""
    return [t.data_ptr() for tensors in (weights, gammas, results) for t in tensors]


def table_of(weights: Sequence[Tensor], addresses: list[int]) -> Table:
    """For fp32 weights `[n, k]`, fp32 gammas `[n]` and results `[n, k]` at these addresses."""
    shapes = [list(sizes) for sizes in zip(*(w.shape for w in weights), strict=True)]
    places = torch.tensor(addresses).view(3, -1)
    tiles = [(i, n) for i, w in enumerate(weights) for n in range(0, w.shape[0], ROWS)]
    device = weights[0].device
    return Table(
        upload(torch.cat([places, torch.tensor(shapes)]), device),
        upload(torch.tensor(tiles, dtype=torch.int32), device),
        addresses,
        not any(number % 16 for number in (*addresses, *shapes[1])),
    )


def fold_layer_scale(results: list[Tensor], tensors: Tensor, tiles: Tensor, aligned: bool) -> None:
    """Write `gamma[:, None] * weight` over `results`, float16 or bfloat16; the rest is of their table."""
    _fold_kernel[(len(tiles),)](
        *tensors, tiles,
        BF16=results[0].dtype == torch.bfloat16, ALIGNED=aligned, ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip


register(
    "fold_layer_scale(Tensor(a!)[] results, Tensor tensors, Tensor tiles, bool aligned) -> ()",
    fold_layer_scale,
)
