"""An `autograd.Function` of the attention half of a last block, whose output is made of wanted tokens alone.

Its backward writes the gradients of attention's output and of the stream once, zeros and all; left to
autograd, they would be filled, copied and added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_kernels.layouts import places_of
from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.halves import Attended, BranchGradient, HalfSpec, Normed, take_branch, trains
from elastic_kernels.triton_ops.layers import Layer, keep, kept
from elastic_kernels.triton_ops.registration import first_order, ops
from elastic_kernels.triton_ops.vector_grads import VectorGrads


class LastAttentionFunction(torch.autograd.Function):
    """`x[only] + row_scale * gamma * proj(attention(qkv(norm(x[rows])))[place])`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        gamma: Tensor | None,
        window_bias: Tensor | None,
        index: Tensor | None,
        places: Tensor | None,
        only: Tensor,
        place: Tensor | None,
        row_scale: Tensor | None,
        spec: HalfSpec,
    ) -> Tensor:
        h, normed = Normed.rows(ctx, unit_stride(x), norm_weight, norm_bias, index, spec)
        qkv_layer = Layer.of(qkv_weight, qkv_bias, None, x.shape[1], spec.first, alone=True)
        proj = Layer.of(proj_weight, proj_bias, gamma, spec.first.out_features, spec.second)
        attended = Attended.of(h, qkv_layer, window_bias, spec, trains(ctx, spec))
        place = only if place is None else place
        o = attended.out
        # Without any sequence that takes part, parameters still get gradients, of zero.
        wanted = o.index_select(0, place) if len(o) else o.new_zeros(len(place), o.shape[1])
        saved = (*normed.tensors, index, places, only, row_scale)
        keep(ctx, (*saved, wanted, *attended), [qkv_layer, proj])
        residual = x.index_select(0, only)
        ctx.spec, ctx.tokens, ctx.before = spec, len(x), BranchGradient.before(x)
        ctx.branch = BranchGradient.of(residual, None, None, row_scale, proj)
        return proj.forward_residual(wanted, residual, None, row_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors, (qkv_layer, proj) = kept(ctx)
        *normed, index, places, only, row_scale, wanted, h, qkv, out, lse, bias = tensors
        attended = Attended(h, qkv, out, lse, bias)
        d, d_sums = take_branch(ctx, dout, None, row_scale, proj)
        vectors = VectorGrads()
        dw2, db2, dgamma = proj.wgrad(d, wanted, vectors, d_sums)
        source = places_of(only, ctx.tokens)
        of_rows = source if index is None else source.index_select(0, index)
        do, _ = ops.branch_grad(proj.dgrad(d), of_rows, None, out.dtype, False)
        dh, dw1, db1, dbias = attended.backward(do, qkv_layer, vectors, ctx.spec)
        stream, _ = ops.branch_grad(dout, source, None, dout.dtype, False)
        dx, *affine = Normed(*normed).backward(dh, index, places, stream, ctx.spec, vectors, ctx.before)
        vectors.launch()
        return dx, *affine, dw1, db1, dw2, db2, dgamma, dbias, None, None, None, None, None, None
