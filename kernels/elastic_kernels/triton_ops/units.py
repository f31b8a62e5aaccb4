"""Autograd units over the registered operators: what is saved, and the order of the backward.

    linear            x, and the sum before a GELU
    linear residual   x; LayerScale's gradient comes out of the weight's
    mlp               x, and the sum before the GELU (with `recompute` only x); the activation is made again
                      by the product that goes back through it
    half-blocks       normalised rows before and after the affine beside the above, so that a block is two
                      calls for autograd, and the residual stream may be overwritten

They are `autograd.Function`s outside of the registered operators, which saves host time on each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elastic_kernels.triton_ops.attention
import elastic_kernels.triton_ops.layer_norm
import elastic_kernels.triton_ops.linear
import elastic_kernels.triton_ops.linear_wgrad
import elastic_kernels.triton_ops.window_attention  # noqa: F401, each registers its operators
from elastic_kernels.shared_gradients import GradientLedger
from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.registration import first_order
from elastic_kernels.working_weights import in_dtype

ops = torch.ops.elastic_kernels


class LayerSpec(NamedTuple):
    """How a layer uses its weight.

    Attributes:
        groups: matrices stacked in the weight: 1, or 3 for q, k and v.
        out_features: rows of each in use.
        scale: the offset scale.
        dtype: of the product.
        grad_out: a buffer in the weight's shape that its gradient is added to, instead of being returned.
        ledger: of the networks that share the weight in this graph.
        key: of the weight, there.
    """

    groups: int
    out_features: int
    scale: float
    dtype: torch.dtype
    grad_out: Tensor | None = None
    ledger: GradientLedger | None = None
    key: int = 0


@dataclass(frozen=True)
class Layer:
    """The corners of a layer's parameters, and what their gradients need to know."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    full: list[int]
    grad_dtype: torch.dtype
    spec: LayerSpec

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, width: int, spec: LayerSpec
    ) -> Layer:
        """The corner of a weight `[groups * n_max, k_max]` for inputs `width` wide; rounded if it must be."""
        stack = in_dtype(weight, spec.dtype).unflatten(0, (spec.groups, -1))
        corner = stack[:, : spec.out_features, :width].to(spec.dtype)
        if bias is not None:
            bias = bias.unflatten(0, (spec.groups, -1))[:, : spec.out_features]
        if gamma is not None:
            gamma = gamma[: spec.out_features]
        return cls(corner, bias, gamma, list(stack.shape[1:]), weight.dtype, spec)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd saves; `restore` takes it back."""
        return self.weight, self.bias, self.gamma

    def restore(self, saved: Sequence[Tensor | None]) -> Layer:
        """This layer with tensors that autograd saved."""
        weight, bias, gamma = saved
        assert weight is not None
        return Layer(weight, bias, gamma, self.full, self.grad_dtype, self.spec)

    def without_tensors(self) -> Layer:
        """What a context may hold beside the saved tensors."""
        return Layer(self.weight.new_empty(0), None, None, self.full, self.grad_dtype, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_fwd(x, self.weight, self.bias, self.spec.scale)

    def forward_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_gelu_fwd(x, self.weight, self.bias, self.spec.scale)

    def forward_residual(
        self, x: Tensor, residual: Tensor, index: Tensor | None, row_scale: Tensor | None
    ) -> Tensor:
        return ops.linear_residual_fwd(
            x, self.weight, self.bias, residual, self.gamma, index, row_scale, self.spec.scale
        )

    def add_to(self, residual: Tensor, x: Tensor, index: Tensor | None, row_scale: Tensor | None) -> None:
        """`forward_residual` in place."""
        ops.linear_residual_(
            x, self.weight, self.bias, residual, self.gamma, index, row_scale, self.spec.scale
        )

    def dgrad(self, dy: Tensor) -> Tensor:
        return ops.linear_dgrad(dy, self.weight, self.gamma, self.spec.scale)

    def dgrad_gelu(self, dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_dgrad_gelu(dy, self.weight, self.gamma, u, self.spec.scale)

    def wgrad(self, dy: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of weight (None if it went elsewhere), bias and LayerScale, where there are such."""
        has_bias, spec, dweight = self.bias is not None, self.spec, None
        _, out, width = self.weight.shape
        parameters = (self.weight, self.bias, self.gamma, spec.scale)
        rest = (self.full[0], self.grad_dtype, has_bias)
        whole = [out, width] == self.full
        if spec.grad_out is not None:
            into = spec.grad_out.unflatten(0, (spec.groups, -1))[:, :out, :width]
            dbias, dgamma = ops.linear_wgrad_into(into, dy, x, *parameters, *rest, True)
        elif spec.ledger is not None and not whole and spec.ledger.awaits_whole(spec.key):
            into = torch.empty(self.weight.shape, dtype=self.grad_dtype, device=dy.device)
            dbias, dgamma = ops.linear_wgrad_into(into, dy, x, *parameters, *rest, False)
            spec.ledger.leave(spec.key, into)
        else:
            dweight, dbias, dgamma = ops.linear_wgrad(
                dy, x, *parameters, self.full, self.grad_dtype, has_bias
            )
            if spec.ledger is not None and whole:
                spec.ledger.complete(spec.key, dweight.unflatten(0, (spec.groups, -1)))
        return dweight, dbias if has_bias else None, dgamma if self.gamma is not None else None


def _keep(ctx: Any, tensors: Sequence[Tensor | None], layers: Sequence[Layer]) -> None:
    ctx.save_for_backward(*tensors, *(tensor for layer in layers for tensor in layer.tensors))
    ctx.layers = [layer.without_tensors() for layer in layers]


def _kept(ctx: Any) -> tuple[list[Any], list[Layer]]:
    saved, count = list(ctx.saved_tensors), 3 * len(ctx.layers)
    tensors, rest = saved[: len(saved) - count], saved[len(saved) - count :]
    return tensors, [layer.restore(rest[3 * i : 3 * i + 3]) for i, layer in enumerate(ctx.layers)]


def _branch_gradient(
    dout: Tensor, index: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of a branch's rows in the dtype of the products; the given one if nothing changes it."""
    if index is None and row_scale is None and dout.dtype == dtype:
        return unit_stride(dout)
    return ops.branch_grad(dout, index, row_scale, dtype)


class LinearFunction(torch.autograd.Function):
    """A product with a corner, its bias, and perhaps a GELU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec, activation: str | None
    ) -> Tensor:
        x = unit_stride(x.to(spec.dtype))
        layer = Layer.of(weight, bias, None, x.shape[1], spec)
        u, y = layer.forward_gelu(x) if activation else (None, layer.forward(x))
        _keep(ctx, (x, u), [layer])
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, u), (layer,) = _kept(ctx)
        dy = unit_stride(dy if u is None else torch.ops.aten.gelu_backward(dy, u))
        dx = layer.dgrad(dy) if ctx.needs_input_grad[0] else None
        dweight, dbias, _ = layer.wgrad(dy, x) if any(ctx.needs_input_grad[1:3]) else (None, None, None)
        return dx, dweight, dbias, None, None


class LinearResidualFunction(torch.autograd.Function):
    """A product with a corner, LayerScale, and the residual addition to chosen rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gamma: Tensor | None,
        index: Tensor | None,
        row_scale: Tensor | None,
        spec: LayerSpec,
    ) -> Tensor:
        x = unit_stride(x.to(spec.dtype))
        layer = Layer.of(weight, bias, gamma, x.shape[1], spec)
        _keep(ctx, (x, index, row_scale), [layer])
        return layer.forward_residual(x, unit_stride(residual), index, row_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x, index, row_scale), (layer,) = _kept(ctx)
        d = _branch_gradient(dout, index, row_scale, x.dtype)
        dweight, dbias, dgamma = layer.wgrad(d, x)
        return layer.dgrad(d), dweight, dbias, dout, dgamma, None, None, None


def _mlp_backward(
    d: Tensor, x: Tensor, u: Tensor | None, fc1: Layer, fc2: Layer
) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The gradient of the MLP's input and those of the parameters of both layers."""
    if u is None:
        u, _ = fc1.forward_gelu(x)  # by the same kernel as before, hence the same bits
    du, activation = fc2.dgrad_gelu(d, u)
    second = fc2.wgrad(d, activation)
    del activation
    return fc1.dgrad(du), fc1.wgrad(du, x), second


class MlpFunction(torch.autograd.Function):
    """Both layers of an MLP around a GELU, LayerScale, and the residual addition to chosen rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor | None,
        index: Tensor | None,
        row_scale: Tensor | None,
        specs: tuple[LayerSpec, LayerSpec],
        recompute: bool,
    ) -> Tensor:
        x = unit_stride(x.to(specs[0].dtype))
        fc1 = Layer.of(fc1_weight, fc1_bias, None, x.shape[1], specs[0])
        fc2 = Layer.of(fc2_weight, fc2_bias, gamma, specs[0].out_features, specs[1])
        u, activation = fc1.forward_gelu(x)
        _keep(ctx, (x, None if recompute else u, index, row_scale), [fc1, fc2])
        ctx.has_residual = residual is not None
        if residual is None:
            return fc2.forward(activation)
        return fc2.forward_residual(activation, unit_stride(residual), index, row_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x, u, index, row_scale), (fc1, fc2) = _kept(ctx)
        d = _branch_gradient(dout, index, row_scale, x.dtype)
        dx, (dw1, db1, _), (dw2, db2, dgamma) = _mlp_backward(d, x, u, fc1, fc2)
        return dx, dw1, db1, dw2, db2, dout if ctx.has_residual else None, dgamma, None, None, None, None


class Windows(NamedTuple):
    """Of windowed attention: side and shift in tokens, and what is added where regions differ."""

    side: int
    shift: int
    apart: float


class HalfSpec(NamedTuple):
    """What a half-block needs beside tensors.

    Attributes:
        eps: of the norm.
        first, second: its layers.
        reuse: the residual stream may be overwritten.
        recompute: save less, and make the hidden layer of an MLP half again.
        attention_groups: flat `(count, length)` pairs of the rows that take part, or with windows
            `(count, height, width)`.
        head_dim: channels of a head.
        windows: attention is within windows of maps.
    """

    eps: float
    first: LayerSpec
    second: LayerSpec
    reuse: bool
    recompute: bool = False
    attention_groups: Sequence[int] = ()
    head_dim: int = 0
    windows: Windows | None = None


@dataclass(frozen=True)
class _Normed:
    """What a half-block keeps of its norm for backward.

    Attributes:
        xhat: the rows that take part, before the affine.
        weight: of the affine.
        rstd: fp32 `[rows]`.
    """

    xhat: Tensor
    weight: Tensor | None
    rstd: Tensor

    @classmethod
    def rows(
        cls,
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        spec: HalfSpec,
    ) -> tuple[Tensor, _Normed]:
        """The normalised rows, and what to keep."""
        apart = weight is not None and any(ctx.needs_input_grad)  # else they are what follows
        h, _, xhat, _, rstd = ops.layer_norm_fwd(
            x, None, weight, bias, spec.eps, index, spec.first.dtype, apart
        )
        return h, cls(xhat if apart else h, weight, rstd)

    def backward(self, dh: Tensor, index: Tensor | None, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a half-block's input, with that of its residual path, and of the affine."""
        dx, dweight, dbias = ops.layer_norm_bwd(
            dh, None, self.xhat, self.weight, self.rstd, self.rstd, index, unit_stride(dout)
        )
        return (dx, None, None) if self.weight is None else (dx, dweight, dbias)


def _add_branch(
    ctx: Any,
    layer: Layer,
    branch: Tensor,
    x: Tensor,
    index: Tensor | None,
    row_scale: Tensor | None,
    reuse: bool,
) -> Tensor:
    """The stream with a branch added: in place where that is allowed."""
    if not reuse or x.stride(-1) != 1:
        return layer.forward_residual(branch, unit_stride(x), index, row_scale)
    layer.add_to(x, branch, index, row_scale)
    ctx.mark_dirty(x)
    return x


def _padding(layer: Layer, qkv: Tensor) -> Tensor:
    """q, k and v of padded positions, `[3, heads, head_dim]`: maps are padded with zeros, so the bias."""
    assert layer.bias is not None
    return layer.bias.unflatten(-1, qkv.shape[2:]).to(qkv.dtype).contiguous()


def _attend(qkv: Tensor, layer: Layer, bias: Tensor | None, spec: HalfSpec) -> tuple[Tensor, Tensor]:
    """Attention's output and log-sum-exp."""
    if spec.windows is None:
        return ops.attention_fwd(qkv, spec.attention_groups)
    return ops.window_attention_fwd(qkv, bias, _padding(layer, qkv), spec.attention_groups, *spec.windows)


def _attend_backward(
    qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor, layer: Layer, bias: Tensor | None, spec: HalfSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv, of the bias of windows, and of the padding."""
    if spec.windows is None:
        return ops.attention_bwd(qkv, o, lse, do, spec.attention_groups), None, None
    pad, maps = _padding(layer, qkv), spec.attention_groups
    return ops.window_attention_bwd(qkv, bias, pad, lse, do, maps, *spec.windows)


class AttentionHalfFunction(torch.autograd.Function):
    """`x[rows] += row_scale * gamma * proj(attention(qkv(norm(x[rows]))))`, perhaps as a new tensor."""

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
        row_scale: Tensor | None,
        spec: HalfSpec,
    ) -> Tensor:
        width = x.shape[1]
        h, normed = _Normed.rows(ctx, unit_stride(x), norm_weight, norm_bias, index, spec)
        qkv_layer = Layer.of(qkv_weight, qkv_bias, None, width, spec.first)
        proj = Layer.of(proj_weight, proj_bias, gamma, width, spec.second)
        qkv = qkv_layer.forward(h).unflatten(-1, (-1, spec.head_dim))
        bias = None if window_bias is None else window_bias.contiguous()
        o, lse = _attend(qkv, qkv_layer, bias, spec)
        kept = (normed.xhat, norm_weight, normed.rstd, index, row_scale, h, qkv, o, lse, bias)
        _keep(ctx, kept, [qkv_layer, proj])
        ctx.spec = spec
        return _add_branch(ctx, proj, o, x, index, row_scale, spec.reuse)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (*normed, index, row_scale, h, qkv, o, lse, bias), (qkv_layer, proj) = _kept(ctx)
        d = _branch_gradient(dout, index, row_scale, h.dtype)
        dw2, db2, dgamma = proj.wgrad(d, o)
        do = proj.dgrad(d)
        dqkv, dbias, dpad = _attend_backward(qkv, o, lse, do, qkv_layer, bias, ctx.spec)
        dqkv = dqkv.flatten(2)
        dw1, db1, _ = qkv_layer.wgrad(dqkv, h)
        if db1 is not None and dpad is not None:
            db1.unflatten(0, (3, -1))[:, : dqkv.shape[2]] += dpad.flatten(1)
        dh = qkv_layer.dgrad(dqkv)
        dx, *affine = _Normed(*normed).backward(dh, index, dout)
        return dx, *affine, dw1, db1, dw2, db2, dgamma, dbias, None, None, None


class MlpHalfFunction(torch.autograd.Function):
    """`x[rows] += row_scale * gamma * mlp(norm(x[rows]))`, perhaps as a new tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        gamma: Tensor | None,
        index: Tensor | None,
        row_scale: Tensor | None,
        spec: HalfSpec,
    ) -> Tensor:
        h, normed = _Normed.rows(ctx, unit_stride(x), norm_weight, norm_bias, index, spec)
        fc1 = Layer.of(fc1_weight, fc1_bias, None, x.shape[1], spec.first)
        fc2 = Layer.of(fc2_weight, fc2_bias, gamma, spec.first.out_features, spec.second)
        u, activation = fc1.forward_gelu(h)
        kept = None if spec.recompute else u
        _keep(ctx, (normed.xhat, norm_weight, normed.rstd, index, row_scale, h, kept), [fc1, fc2])
        return _add_branch(ctx, fc2, activation, x, index, row_scale, spec.reuse)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (*normed, index, row_scale, h, u), (fc1, fc2) = _kept(ctx)
        d = _branch_gradient(dout, index, row_scale, h.dtype)
        dh, (dw1, db1, _), (dw2, db2, dgamma) = _mlp_backward(d, h, u, fc1, fc2)
        dx, *affine = _Normed(*normed).backward(dh, index, dout)
        return dx, *affine, dw1, db1, dw2, db2, dgamma, None, None, None
