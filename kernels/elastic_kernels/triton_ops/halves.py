"""`autograd.Function`s of the halves of a transformer block: a block is two calls for autograd.

Saved are the normalised rows before and after the affine, and what the layers need (`layers.py`): the
residual stream itself is not, so that it may be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elastic_kernels.triton_ops.attention
import elastic_kernels.triton_ops.window_attention  # noqa: F401, each registers its operators
from elastic_kernels.layouts import places_of
from elastic_kernels.shared_gradients import earlier_gradients
from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.layer_norm import branch_room
from elastic_kernels.triton_ops.layers import Layer, LayerSpec, branch_gradient, keep, kept, mlp_backward
from elastic_kernels.triton_ops.registration import first_order, ops
from elastic_kernels.triton_ops.vector_grads import VectorGrads, side_by_side


class WindowSpec(NamedTuple):
    """Of windowed attention: side and shift in tokens, and what is added to scores where regions differ."""

    side: int
    shift: int
    mask_value: float


class HalfSpec(NamedTuple):
    """What a half-block needs beside tensors.

    Attributes:
        eps: of the norm.
        first, second: its layers.
        inplace: the residual stream may be overwritten.
        attention_groups: flat `(count, length)` pairs of the rows that take part, or with windows
            `(count, height, width)`.
        head_dim: channels of a head.
        windows: attention is within windows of maps.
    """

    eps: float
    first: LayerSpec
    second: LayerSpec
    inplace: bool
    attention_groups: Sequence[int] = ()
    head_dim: int = 0
    windows: WindowSpec | None = None


def trains(ctx: Any, spec: HalfSpec) -> bool:
    """Whether backward may follow."""
    return spec.first.trains and any(ctx.needs_input_grad)


@dataclass
class BranchGradient:
    """What the branch of a half-block takes of the stream's gradient; left by the half-block that makes that.

    So it costs no pass of its own over the stream, if that gradient comes as it was made. What is `left` are
    the stream's gradient and its version, and what `branch_gradient` makes of it.

    Attributes: places, scale: of the tokens that take part, as of `KeptRows`; None of all. rows, dtype: how
    many take part, in which dtype of products. wants_sums: for a bias.
    """

    places: Tensor | None
    scale: Tensor | None
    rows: int
    dtype: torch.dtype
    wants_sums: bool
    left: tuple[Tensor, int, tuple[Tensor, Tensor | None]] | None = None

    @classmethod
    def of(
        cls, x: Tensor, index: Tensor | None, places: Tensor | None, scale: Tensor | None, layer: Layer
    ) -> BranchGradient | None:
        """Of a branch that ends in a layer; None if it takes the gradient as it is, or none can be left."""
        dtype, unchanged = layer.weight.dtype, index is None and scale is None
        if torch.compiler.is_compiling() or (unchanged and x.dtype == dtype):
            return None
        if index is not None and places is None:
            return None
        return cls(places, scale, (x if index is None else index).shape[0], dtype, layer.bias is not None)

    @staticmethod
    def before(x: Tensor) -> BranchGradient | None:
        """Of the half-block that made the stream."""
        branch = None if torch.compiler.is_compiling() else getattr(x.grad_fn, "branch", None)
        return branch if isinstance(branch, BranchGradient) else None

    def take(self, dout: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """What was left of this very gradient, which no hook has changed."""
        left, self.left = self.left, None
        if left is None or left[0] is not dout or left[1] != dout._version:
            return None
        return left[2]


@dataclass(frozen=True)
class Normed:
    """What a half-block keeps of its norm for backward: the rows that take part before the affine, the
    affine, whole, and fp32 `[rows]` rstd."""

    xhat: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rstd: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd saves."""
        return self.xhat, self.weight, self.bias, self.rstd

    @classmethod
    def rows(
        cls,
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        spec: HalfSpec,
    ) -> tuple[Tensor, Normed]:
        """The normalised rows, and what to keep."""
        keep = trains(ctx, spec)
        apart = keep and weight is not None  # else they are what follows, or nothing follows
        ledger = spec.first.ledger
        if (
            ledger is not None
            and weight is not None
            and ctx.needs_input_grad[1]
            and weight.numel() == x.shape[1]
        ):
            ledger.expect(weight)
        arguments = (x, weight, bias, spec.eps, index, spec.first.dtype)
        h, xhat, _, rstd = ops.layer_norm_fwd(*arguments, apart, None, keep)
        return h, cls(xhat if apart else h, weight, bias, rstd)

    def backward(
        self,
        dh: Tensor,
        index: Tensor | None,
        places: Tensor | None,
        dout: Tensor,
        spec: HalfSpec,
        vectors: VectorGrads,
        before: BranchGradient | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a half-block's input, with that of its residual path, and of the affine if they do not
        wait elsewhere, complete once `vectors` are launched. Leaves what the half-block `before` takes."""
        if index is not None and places is None:
            places = places_of(index, len(dout))
        stream = unit_stride(dout)
        arguments = (dh, None, self.xhat, self.weight, None, self.rstd, places, stream)
        if before is None:
            dx, partials = ops.layer_norm_bwd(*arguments)
        else:
            room = branch_room(stream, before.rows, before.dtype, before.wants_sums)
            dx, partials = ops.layer_norm_bwd(*arguments, *room, before.places, before.scale)
            before.left = dx, dx._version, room
        ledger, weight, waiting = spec.first.ledger, self.weight, None
        if weight is None:
            return dx, None, None
        if ledger is not None and weight.numel() == dh.shape[1]:
            waiting = ledger.arrived(id(weight))
        if ledger is not None and ledger.accumulates and waiting is None:
            earlier = side_by_side(earlier_gradients((weight, self.bias)))
            if earlier is not None:
                vectors.add_to(earlier, partials)
                return dx, None, None
        (addend,) = waiting or (None,)
        affine = vectors.add(partials, weight.numel(), weight.dtype, addend)
        if ledger is not None and ledger.awaits_whole(id(weight)):
            ledger.leave(id(weight), affine)
            return dx, None, None
        return dx, *affine.split(weight.numel())


def _add_branch(
    ctx: Any,
    layer: Layer,
    branch: Tensor,
    x: Tensor,
    index: Tensor | None,
    row_scale: Tensor | None,
    inplace: bool,
) -> Tensor:
    """The stream with a branch added: in place where that is allowed."""
    if not inplace or x.stride(-1) != 1:
        return layer.forward_residual(branch, unit_stride(x), index, row_scale)
    layer.add_to(x, branch, index, row_scale)
    if layer.spec.trains or not torch.compiler.is_compiling():  # whose graphs of inference have no context
        ctx.mark_dirty(x)
    return x


def take_branch(
    ctx: Any, dout: Tensor, index: Tensor | None, row_scale: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor | None]:
    """As `branch_gradient`, if it was not left by the half-block after this one."""
    left = None if ctx.branch is None else ctx.branch.take(dout)
    return left or branch_gradient(dout, index, row_scale, layer)


def _padding(layer: Layer, qkv: Tensor) -> Tensor:
    """q, k and v of padded positions, `[3, heads, head_dim]`: maps are padded with zeros, so the bias."""
    assert layer.bias is not None
    return layer.bias.unflatten(-1, qkv.shape[2:]).to(qkv.dtype).contiguous()


class Attended(NamedTuple):
    """Normalised rows that have attended to each other, and what their backward needs."""

    h: Tensor
    qkv: Tensor
    out: Tensor
    lse: Tensor
    tiles: Tensor | None

    @classmethod
    def of(cls, h: Tensor, layer: Layer, bias: Tensor | None, spec: HalfSpec, keep: bool) -> Attended:
        """Rows, with the layer that makes their q, k and v, and the bias of windows; perhaps for backward."""
        qkv = layer.forward(h).unflatten(-1, (-1, spec.head_dim))
        groups, tiles = spec.attention_groups, None
        if spec.windows is None:
            out, lse = ops.attention_fwd(qkv, groups, None, keep)
        else:
            tiles, pad = ops.window_bias_tiles(bias, spec.windows.side), _padding(layer, qkv)
            out, lse = ops.window_attention_fwd(qkv, tiles, pad, groups, *spec.windows, keep)
        return cls(h, qkv, out, lse, tiles)

    def backward(
        self, do: Tensor, layer: Layer, vectors: VectorGrads, spec: HalfSpec
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the rows, of the layer's weight and bias, complete once `vectors` are launched, and of
        the bias of windows."""
        groups, sums, dbias, dpad = spec.attention_groups, None, None, None
        if spec.windows is None:
            wants_sums = layer.bias is not None
            dqkv, sums = ops.attention_bwd(self.qkv, self.out, self.lse, do, groups, wants_sums)
        else:
            pad = _padding(layer, self.qkv)
            dqkv, dbias, dpad = ops.window_attention_bwd(
                self.qkv, self.tiles, pad, self.lse, do, groups, *spec.windows
            )
        dqkv = dqkv.flatten(2)
        dw, db, _ = layer.wgrad(dqkv, self.h, vectors, sums, None if dpad is None else dpad.flatten(1))
        return layer.dgrad(dqkv), dw, db, dbias


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
        places: Tensor | None,
        spec: HalfSpec,
    ) -> Tensor:
        h, normed = Normed.rows(ctx, unit_stride(x), norm_weight, norm_bias, index, spec)
        qkv_layer = Layer.of(qkv_weight, qkv_bias, None, x.shape[1], spec.first, alone=True)
        proj = Layer.of(proj_weight, proj_bias, gamma, spec.first.out_features, spec.second)
        attended = Attended.of(h, qkv_layer, window_bias, spec, trains(ctx, spec))
        saved = (*normed.tensors, index, row_scale, places, *attended)
        keep(ctx, saved, [qkv_layer, proj])
        ctx.spec, ctx.before = spec, BranchGradient.before(x)
        ctx.branch = BranchGradient.of(x, index, places, row_scale, proj)
        return _add_branch(ctx, proj, attended.out, x, index, row_scale, spec.inplace)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (*normed, index, row_scale, places, h, qkv, out, lse, tiles), (qkv_layer, proj) = kept(ctx)
        attended = Attended(h, qkv, out, lse, tiles)
        d, d_sums = take_branch(ctx, dout, index, row_scale, proj)
        vectors = VectorGrads()
        dw2, db2, dgamma = proj.wgrad(d, out, vectors, d_sums)
        dh, dw1, db1, dbias = attended.backward(proj.dgrad(d), qkv_layer, vectors, ctx.spec)
        dx, *affine = Normed(*normed).backward(dh, index, places, dout, ctx.spec, vectors, ctx.before)
        vectors.launch()
        return dx, *affine, dw1, db1, dw2, db2, dgamma, dbias, None, None, None, None


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
        places: Tensor | None,
        spec: HalfSpec,
    ) -> Tensor:
        h, normed = Normed.rows(ctx, unit_stride(x), norm_weight, norm_bias, index, spec)
        fc1 = Layer.of(fc1_weight, fc1_bias, None, x.shape[1], spec.first)
        fc2 = Layer.of(fc2_weight, fc2_bias, gamma, spec.first.out_features, spec.second)
        u, activation = fc1.forward_act(h, "gelu")
        inner = h, u, fc1.kept(activation)
        keep(ctx, (*normed.tensors, index, row_scale, places, *inner), [fc1, fc2])
        ctx.spec, ctx.before = spec, BranchGradient.before(x)
        ctx.branch = BranchGradient.of(x, index, places, row_scale, fc2)
        return _add_branch(ctx, fc2, activation, x, index, row_scale, spec.inplace)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (*normed, index, row_scale, places, h, u, activation), (fc1, fc2) = kept(ctx)
        d, sums = take_branch(ctx, dout, index, row_scale, fc2)
        vectors = VectorGrads()
        inner = h, u, activation
        dh, (dw1, db1, _), (dw2, db2, dgamma) = mlp_backward(d, sums, *inner, fc1, fc2, vectors)
        dx, *affine = Normed(*normed).backward(dh, index, places, dout, ctx.spec, vectors, ctx.before)
        vectors.launch()
        return dx, *affine, dw1, db1, dw2, db2, dgamma, None, None, None, None
