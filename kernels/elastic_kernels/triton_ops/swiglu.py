"""Triton kernels of a SwiGLU's gate, one pass each way.

    y = silu(g) * u,  dg = dy * u * sigma(g) * (1 + g * (1 - sigma(g))),  du = dy * silu(g)

Saved for backward: g and u. Bytes: forward reads 2 and writes 1 of rows * hidden elements, backward reads 3
and writes 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv
from elastic_kernels.triton_ops.registration import first_order, register

ROWS, BLOCK = 4, 512  # 16 values a thread; not timed on a GPU yet


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    h_ptr, dy_ptr, out_ptr,
    rows, hidden,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < rows)[:, None] & (offs_k < hidden)[None, :]
    one = offs_r.to(tl.int64)[:, None] * hidden + offs_k[None, :]
    two = one + offs_r.to(tl.int64)[:, None] * hidden
    g = tl.load(h_ptr + two, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_ptr + two + hidden, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    if BACKWARD:
        dy = tl.load(dy_ptr + one, mask=mask, other=0.0).to(tl.float32)
        dg = dy * u * sigma * (1 + g * (1 - sigma))
        tl.store(out_ptr + two, dg.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + two + hidden, (dy * g * sigma).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + one, (g * sigma * u).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(h: Tensor, dy: Tensor | None, out: Tensor) -> Tensor:
    rows, _, hidden = h.shape
    if rows:
        _swiglu_kernel[(cdiv(rows, ROWS), cdiv(hidden, BLOCK))](
            h, dy, out, rows, hidden, BACKWARD=dy is not None, ROWS=ROWS, BLOCK=BLOCK
        )
    return out


def swiglu_fwd(h: Tensor) -> Tensor:
    """`h` `[rows, 2, hidden]`, contiguous -> `[rows, hidden]`."""
    return _launch(h, None, torch.empty(h.shape[0], h.shape[2], dtype=h.dtype, device=h.device))


def swiglu_bwd(h: Tensor, dy: Tensor) -> Tensor:
    """The gradient of h; `dy` `[rows, hidden]` is contiguous."""
    return _launch(h, dy, torch.empty(h.shape, dtype=h.dtype, device=h.device))


register("swiglu_fwd(Tensor h) -> Tensor", swiglu_fwd, lambda h: h.new_empty(h.shape[0], h.shape[2]))
register("swiglu_bwd(Tensor h, Tensor dy) -> Tensor", swiglu_bwd, lambda h, dy: h.new_empty(h.shape))


class SwiGLUFunction(torch.autograd.Function):
    """The gate of `[rows, 2, hidden]`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        return torch.ops.elastic_kernels.swiglu_fwd(h)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return torch.ops.elastic_kernels.swiglu_bwd(h, dy.contiguous())
