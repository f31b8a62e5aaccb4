"""An `autograd.Function` of several MLPs on the same rows.

The rows are rounded once, and the products that lead back to them are added in fp32, by cuBLAS. Saved for
backward: the rows, and the sums before the GELUs; the activations are made again, unless they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.gemm import product_into
from elastic_kernels.triton_ops.layers import Layer, LayerSpec, keep, kept
from elastic_kernels.triton_ops.registration import first_order
from elastic_kernels.triton_ops.vector_grads import VectorGrads


class HeadMlpsFunction(torch.autograd.Function):
    """Outputs of all MLPs; `parameters` are weight and bias of each layer of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, specs: Sequence[Sequence[LayerSpec]], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = unit_stride(x.to(specs[0][0].dtype))
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        inner, layers, outputs = [], [], []
        for chain in specs:
            h = rows
            for place, spec in enumerate(chain):
                weight, bias = next(pairs)
                assert weight is not None
                last = place == len(chain) - 1
                layer = Layer.of(weight, bias, None, h.shape[1], spec, alone=last)
                layers.append(layer)
                if last:
                    outputs.append(layer.forward(h))
                else:
                    u, h = layer.forward_act(h, "gelu")
                    inner += [u, layer.kept(h)]
        keep(ctx, (rows, *inner), layers)
        ctx.depths, ctx.dtype = [len(chain) for chain in specs], x.dtype
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, *inner), layers = kept(ctx)
        pairs = list(zip(inner[::2], inner[1::2], strict=True))
        dx = rows.new_empty(rows.shape, dtype=torch.float32)
        of_layers: list[Tensor | None] = []
        vectors = VectorGrads()
        for number, (dy, depth) in enumerate(zip(gradients, ctx.depths, strict=True)):
            chain, layers = layers[:depth], layers[depth:]
            of_inner, pairs = pairs[: depth - 1], pairs[depth - 1 :]
            d, d_sums, of_chain = unit_stride(dy), None, []
            for layer, (u, activation) in zip(chain[:0:-1], of_inner[::-1], strict=True):
                du, h, du_sums = layer.dgrad_act(d, u, activation, "gelu")
                of_chain.append(layer.wgrad(d, h, vectors, d_sums))
                d, d_sums = du, du_sums
            of_chain.append(chain[0].wgrad(d, rows, vectors, d_sums))
            product_into(dx, d, chain[0].weight[0], scale=chain[0].spec.scale, add=number > 0)
            of_layers += [gradient for dw, db, _ in reversed(of_chain) for gradient in (dw, db)]
        vectors.launch()
        return dx.to(ctx.dtype), None, *of_layers
