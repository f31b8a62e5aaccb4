"""The two halves of an elastic pre-norm transformer block on packed tokens.

    x[rows] += row_scale * gamma1 * proj(attention(qkv(norm1(x[rows]))))
    x[rows] += row_scale * gamma2 * fc2(gelu(fc1(norm2(x[rows]))))

Attention is within sequences, where a last block may make only the tokens that are read after it (`only`), or
within windows of maps.

On Triton a half is one autograd unit (`triton_ops/units.py`); elsewhere it is made of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.attention import attention_backend, packed_attention
from elastic_kernels.layer_norm import elastic_layer_norm, layer_norm_backend
from elastic_kernels.linear import elastic_linear_residual, elastic_qkv, layer_spec, linear_backend
from elastic_kernels.mlp import elastic_hidden_features, elastic_mlp
from elastic_kernels.window_attention import (
    APART,
    validate_windows,
    window_attention,
    window_attention_backend,
)

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.units import Windows


@dataclass(frozen=True)
class KeptRows:
    """The sequences that take part in a half-block; the others pass it by unchanged (stochastic depth).

    Attributes:
        groups: `(kept sequences, length)` of each length class.
        rows: int64 `[kept tokens]`, their distinct positions in the packed tensor.
        scale: float32 `[kept tokens]`, the inverse of the keep rate of each row.
    """

    groups: tuple[tuple[int, int], ...]
    rows: Tensor
    scale: Tensor

    def among(self, only: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Where the tokens `only` (int64 `[live]`) stand among the kept ones, and their factors.

        A token that is not kept stands anywhere, with the factor 0. Nothing waits for the device.
        """
        place = only.new_full((tokens,), -1)
        place[self.rows] = torch.arange(len(self.rows), device=place.device)
        place = place.index_select(0, only)
        scale = self.scale if len(self.scale) else self.scale.new_zeros(1)
        return place.clamp(min=0), scale.index_select(0, place.clamp(min=0)) * (place >= 0)


def elastic_attention_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    groups: Sequence[tuple[int, int]],
    head_dim: int,
    *,
    kept: KeptRows | None = None,
    only: Tensor | None = None,
    reuse: bool = False,
    grad_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LayerNorm, attention over packed sequences, projection, LayerScale and the residual addition.

    Args:
        x: `[tokens, w]`, the residual stream; not modified without `reuse`.
        norm_weight, norm_bias, eps: as in `elastic_layer_norm`.
        qkv_weight, qkv_bias: as in `elastic_qkv`.
        proj_weight, proj_bias, gamma: as in `elastic_linear_residual`.
        groups: `(count, length)` of each length class in packing order.
        head_dim: channels of a head; `w` is a multiple of it.
        kept: the sequences that take part; None means all.
        only: int64 `[live]`, distinct tokens that are wanted; the projection is made of these alone. Queries
            are made of all: leaving them out would take attention over ragged queries, for 0.4 % of a step of
            ViT-L/16 by the cost model.
        reuse: the result may overwrite `x`, which nobody else needs; not for a leaf that requires gradients.
        grad_out: buffers for the gradients of `qkv_weight` and `proj_weight`, as in `elastic_linear`.

    Returns:
        `[tokens, w]`, or with `only` `[live, w]`; the dtype of `x`.

    Raises:
        ValueError: `w` is no multiple of `head_dim`, or as the operators it is made of.
        TypeError, RuntimeError: as those.
    """
    op, width = "elastic_attention_half", x.shape[-1]
    if width % head_dim:
        raise ValueError(f"{op}: expected a width that is a multiple of head_dim {head_dim}, got {width}")
    rows, scale = (kept.rows, kept.scale) if kept else (None, None)
    active = kept.groups if kept else groups
    _require_cover(op, active, [count * length for count, length in active], x if rows is None else rows)
    attention = attention_backend(x, active, head_dim, dispatch.product_dtype(x))
    if attention.backend == "triton" and _fused(op, x) and only is None:
        parameters = _AttentionParameters(
            norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma
        )
        flat = [number for group in active for number in group]
        return _attention_unit(op, x, parameters, eps, flat, head_dim, kept, reuse, grad_out)
    qkv_grad, proj_grad = grad_out or (None, None)
    h = elastic_layer_norm(x, norm_weight, norm_bias, eps, rows=rows)
    qkv = elastic_qkv(h, qkv_weight, qkv_bias, grad_out=qkv_grad)
    h = packed_attention(qkv.unflatten(-1, (-1, head_dim)), active)
    if only is not None:
        h, scale = _wanted(h, only, kept, x.shape[0])
        x, rows = x.index_select(0, only), None
    return elastic_linear_residual(
        h, proj_weight, proj_bias, x, gamma, rows=rows, row_scale=scale, grad_out=proj_grad
    )


def elastic_window_attention_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    window_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    maps: Sequence[tuple[int, int, int]],
    head_dim: int,
    *,
    window: int,
    shift: int = 0,
    kept: KeptRows | None = None,
    reuse: bool = False,
    grad_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`elastic_attention_half` with attention within windows of maps, which are padded with zeros (Swin).

    Args:
        x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, head_dim, kept,
            reuse, grad_out: as of `elastic_attention_half`.
        window_bias: `[heads_max, n, n]`, n = window**2, as the bias of `window_attention`.
        maps: `(count, height, width)` of each group in packing order; how many take part, `kept.groups` says.
        window, shift: as of `window_attention`.

    Returns:
        `[tokens, w]`, the dtype of `x`.

    Raises:
        ValueError: `w` is no multiple of `head_dim`, or as the operators it is made of.
        TypeError, RuntimeError: as those.
    """
    op, width = "elastic_window_attention_half", x.shape[-1]
    if width % head_dim:
        raise ValueError(f"{op}: expected a width that is a multiple of head_dim {head_dim}, got {width}")
    rows, scale = (kept.rows, kept.scale) if kept else (None, None)
    if kept is not None:
        sizes = zip(kept.groups, maps, strict=True)
        maps = [(count, height, across) for (count, _), (_, height, across) in sizes]
    covered = [count * height * across for count, height, across in maps]
    _require_cover(op, maps, covered, x if rows is None else rows)
    attention = window_attention_backend(x, window, head_dim, dispatch.product_dtype(x))
    if attention.backend == "triton" and _fused(op, x):
        from elastic_kernels.triton_ops.units import Windows

        validate_windows(op, width // head_dim, window_bias, window, shift)
        parameters = _AttentionParameters(
            norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma
        )
        flat, windows = [number for group in maps for number in group], Windows(window, shift, APART)
        return _attention_unit(
            op, x, parameters, eps, flat, head_dim, kept, reuse, grad_out, windows, window_bias
        )
    qkv_grad, proj_grad = grad_out or (None, None)
    h = elastic_layer_norm(x, norm_weight, norm_bias, eps, rows=rows)
    qkv = elastic_qkv(h, qkv_weight, qkv_bias, grad_out=qkv_grad).unflatten(-1, (-1, head_dim))
    pad = qkv_bias.view(3, -1, head_dim)
    h = window_attention(qkv, window_bias, pad, maps, window=window, shift=shift)
    return elastic_linear_residual(
        h, proj_weight, proj_bias, x, gamma, rows=rows, row_scale=scale, grad_out=proj_grad
    )


class _AttentionParameters(NamedTuple):
    """Of an attention half, in the order in which its unit takes them."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    gamma: Tensor | None


def _attention_unit(
    op: str,
    x: Tensor,
    parameters: _AttentionParameters,
    eps: float,
    groups: Sequence[int],
    head_dim: int,
    kept: KeptRows | None,
    reuse: bool,
    grad_out: tuple[Tensor, Tensor] | None,
    windows: Windows | None = None,
    window_bias: Tensor | None = None,
) -> Tensor:
    """An attention half as one unit for autograd."""
    from elastic_kernels.triton_ops.units import AttentionHalfFunction, HalfSpec

    p, (qkv_grad, proj_grad) = parameters, grad_out or (None, None)
    weights = {"qkv_weight": (p.qkv_weight, qkv_grad), "proj_weight": (p.proj_weight, proj_grad)}
    _validate(op, x, (p.norm_weight, p.norm_bias), weights, kept)
    width, largest = x.shape[1], p.qkv_weight.shape[1]
    if p.qkv_weight.shape[0] != 3 * largest or tuple(p.proj_weight.shape) != (largest, largest):
        shapes = f"{tuple(p.qkv_weight.shape)} and {tuple(p.proj_weight.shape)}"
        raise ValueError(f"{op}: expected qkv_weight [3 * C, C] and proj_weight [C, C], got {shapes}")
    lengths = {"proj_bias": (p.proj_bias, largest), "gamma": (p.gamma, largest)}
    validate.vectors(op, x, qkv_bias=(p.qkv_bias, 3 * largest), **lengths)
    spec = HalfSpec(
        eps,
        layer_spec(x, p.qkv_weight, width, groups=3, grad_out=qkv_grad),
        layer_spec(x, p.proj_weight, width, grad_out=proj_grad),
        reuse,
        attention_groups=groups,
        head_dim=head_dim,
        windows=windows,
    )
    rows, scale = (kept.rows, kept.scale) if kept else (None, None)
    return AttentionHalfFunction.apply(x, *parameters, window_bias, rows, scale, spec)


def _require_cover(op: str, groups: Sequence[object], covered: Sequence[int], rows: Tensor) -> None:
    if sum(covered) != rows.shape[0]:
        raise ValueError(f"{op}: groups {list(groups)} cover {sum(covered)} tokens, expected {rows.shape[0]}")


def elastic_mlp_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    *,
    kept: KeptRows | None = None,
    row_scale: Tensor | None = None,
    recompute: bool = False,
    reuse: bool = False,
    grad_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LayerNorm, MLP, LayerScale and the residual addition.

    Args:
        x: `[tokens, w]`, the residual stream; not modified without `reuse`.
        norm_weight, norm_bias, eps: as in `elastic_layer_norm`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, recompute, grad_out: as in `elastic_mlp`.
        kept: the sequences that take part; None means all.
        reuse: as in `elastic_attention_half`.
        row_scale: float32 `[tokens]`, without `kept`: a factor of each row's branch.

    Returns:
        `[tokens, w]`, the dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as the operators it is made of.
    """
    op = "elastic_mlp_half"
    if kept and row_scale is not None:
        raise ValueError(f"{op}: expected kept or row_scale, got both")
    rows, scale = (kept.rows, kept.scale) if kept else (None, row_scale)
    if _fused(op, x):
        from elastic_kernels.triton_ops.units import HalfSpec, MlpHalfFunction

        fc1_grad, fc2_grad = grad_out or (None, None)
        weights = {"fc1_weight": (fc1_weight, fc1_grad), "fc2_weight": (fc2_weight, fc2_grad)}
        _validate(op, x, (norm_weight, norm_bias), weights, kept)
        validate.vectors(op, x, row_scale=(row_scale, x.shape[0]))
        validate.mlp(op, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma)
        hidden = elastic_hidden_features(x.shape[1], fc1_weight.shape[1], fc1_weight.shape[0])
        spec = HalfSpec(
            eps,
            layer_spec(x, fc1_weight, hidden, grad_out=fc1_grad),
            layer_spec(x, fc2_weight, x.shape[1], width=hidden, grad_out=fc2_grad),
            reuse,
            recompute,
        )
        parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma)
        return MlpHalfFunction.apply(x, *parameters, rows, scale, spec)
    h = elastic_layer_norm(x, norm_weight, norm_bias, eps, rows=rows)
    return elastic_mlp(
        h, fc1_weight, fc1_bias, fc2_weight, fc2_bias, x, gamma,
        rows=rows, row_scale=scale, recompute=recompute, grad_out=grad_out,
    )  # fmt: skip


def _wanted(h: Tensor, only: Tensor, kept: KeptRows | None, tokens: int) -> tuple[Tensor, Tensor | None]:
    """The rows of attention's output that belong to the tokens `only`, and their factors."""
    if kept is None:
        return h.index_select(0, only), None
    place, scale = kept.among(only, tokens)
    if not h.shape[0]:  # no sequence takes part; the parameters still get gradients, of zero
        h = F.pad(h, (0, 0, 0, 1))
    return h.index_select(0, place), scale


def _fused(op: str, x: Tensor) -> bool:
    """Whether every part of a half runs on Triton, so that its unit can."""
    return layer_norm_backend(x).backend == linear_backend(op, x).backend == "triton"


def _validate(
    op: str,
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    weights: dict[str, tuple[Tensor, Tensor | None]],
    kept: KeptRows | None,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: expected x [tokens, width], got {tuple(x.shape)}")
    largest = min(weight.shape[1] for weight, _ in weights.values())
    validate.prefix(op, "width", x.shape[1], largest)
    validate.operands(op, x=x, norm_weight=norm[0], **{name: w for name, (w, _) in weights.items()})
    if norm[0] is not None:
        longest = weights[next(iter(weights))][0].shape[1]
        validate.vectors(op, x, norm_weight=(norm[0], longest), norm_bias=(norm[1], longest))
    if kept is not None:
        kept_tokens = kept.rows.shape[0]
        validate.vectors(op, x, rows=(kept.rows, kept_tokens), row_scale=(kept.scale, kept_tokens))
    for weight, buffer in weights.values():
        validate.grad_out(op, buffer, weight)
