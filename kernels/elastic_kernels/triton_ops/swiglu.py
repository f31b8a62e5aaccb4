"""Triton kernels of the gate of a SwiGLU or GEGLU, one pass each way.

    y = act(g) * u,  dg = dy * u * act'(g),  du = dy * act(g)

Saved for backward: g and u. Bytes: forward reads 2 and writes 1 of rows * hidden elements, backward reads 3
and writes 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.activations import activate, activation_grad
from elastic_kernels.triton_ops.device import cdiv
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import first_order, register

ROWS, BLOCK = 4, 512  # 16 values a thread; not timed on a GPU yet


@launched("rows")
def _swiglu_kernel(
    h_ptr, dy_ptr, out_ptr,
    rows, hidden,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < rows)[:, None] & (offs_k < hidden)[None, :]
    one = offs_r.to(tl.int64)[:, None] * hidden + offs_k[None, :]
    two = one + offs_r.to(tl.int64)[:, None] * hidden
    g = tl.load(h_ptr + two, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_ptr + two + hidden, mask=mask, other=0.0).to(tl.float32)
    EXACT: tl.constexpr = h_ptr.dtype.element_ty == tl.float32
    act = activate(g, ACTIVATION, EXACT)
    if BACKWARD:
        dy = tl.load(dy_ptr + one, mask=mask, other=0.0).to(tl.float32)
        dg = dy * u * activation_grad(g, ACTIVATION, EXACT)
        tl.store(out_ptr + two, dg.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + two + hidden, (dy * act).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + one, (act * u).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(h: Tensor, dy: Tensor | None, out: Tensor, kind: str) -> Tensor:
    rows, _, hidden = h.shape
    if rows:
        _swiglu_kernel[(cdiv(rows, ROWS), cdiv(hidden, BLOCK))](
            h, dy, out,
            rows, hidden,
            ACTIVATION=kind, BACKWARD=dy is not None, ROWS=ROWS, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def swiglu_fwd(h: Tensor, kind: str) -> Tensor:
    """`h` `[rows, 2, hidden]`, contiguous -> `[rows, hidden]`; `kind` of activation."""
    return _launch(h, None, torch.empty(h.shape[0], h.shape[2], dtype=h.dtype, device=h.device), kind)


def swiglu_bwd(h: Tensor, dy: Tensor, kind: str) -> Tensor:
    """The gradient of h; `dy` `[rows, hidden]` is contiguous."""
    return _launch(h, dy, torch.empty(h.shape, dtype=h.dtype, device=h.device), kind)


register(
    "swiglu_fwd(Tensor h, str kind) -> Tensor",
    swiglu_fwd,
    lambda h, kind: h.new_empty(h.shape[0], h.shape[2]),
)
register(
    "swiglu_bwd(Tensor h, Tensor dy, str kind) -> Tensor", swiglu_bwd, lambda h, *rest: h.new_empty(h.shape)
)


class SwiGLUFunction(torch.autograd.Function):
    """The gate of `[rows, 2, hidden]`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str) -> Tensor:
        h = h.contiguous()
        ctx.activation = activation
        ctx.save_for_backward(h)
        return torch.ops.elastic_kernels.swiglu_fwd(h, activation)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return torch.ops.elastic_kernels.swiglu_bwd(h, dy.contiguous(), ctx.activation), None
