"""The two halves of an elastic pre-norm transformer block on packed tokens.

    x[rows] += row_scale * gamma1 * proj(attention(qkv(norm1(x[rows]))))
    x[rows] += row_scale * gamma2 * fc2(gelu(fc1(norm2(x[rows]))))

Attention is within sequences or within windows of maps: a layout says which. A last block may make only the
tokens that are read after it (`only`).

On Triton a half is one `autograd.Function` (`triton_ops/halves.py`); elsewhere it is made of the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import validate
from elastic_kernels.layer_norm import elastic_layer_norm, layer_norm_backend
from elastic_kernels.layouts import KeptRows, Layout
from elastic_kernels.linear import (
    Scale,
    elastic_linear,
    elastic_linear_residual,
    elastic_qkv,
    layer_spec,
    linear_backend,
)
from elastic_kernels.mlp import active_hidden, gated_units, mlp_specs, require_gated

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.layers import LayerSpec


class AttentionWeights(NamedTuple):
    """Parameters of an attention half, of the largest network, C wide.

    Attributes:
        norm_weight, norm_bias: `[C]`, as of `elastic_layer_norm`.
        qkv_weight, qkv_bias: `[3 * n, C]` and `[3 * n]`, as of `elastic_qkv`; `n` is `C`, or the channels of
            all heads.
        proj_weight, proj_bias: `[C, n]` and `[C]`, as of `elastic_linear_residual`.
        gamma: `[C]`, LayerScale, or None.

    Example:
        >>> from elastic_kernels import AttentionWeights, ElasticAttention
        >>> attn = ElasticAttention(64, 16)
        >>> layers = attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias
        >>> AttentionWeights(None, None, *layers).qkv_weight.shape
        torch.Size([192, 64])
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    gamma: Tensor | None = None


class MlpWeights(NamedTuple):
    """Parameters of an MLP half, of the largest network, C wide with H hidden units.

    Attributes:
        norm_weight, norm_bias, gamma: as of `AttentionWeights`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[H, C]`, `[H]`, `[C, H]`, `[C]`, as of `elastic_mlp`;
            with a gate `[2 * H, C]` and `[2 * H]` before, as of `elastic_swiglu`.

    Example:
        >>> from elastic_kernels import ElasticMLP, MlpWeights
        >>> mlp = ElasticMLP(64, 256)
        >>> layers = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
        >>> MlpWeights(None, None, *layers).fc1_weight.shape
        torch.Size([256, 64])
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    gamma: Tensor | None = None


def elastic_attention_half(
    x: Tensor,
    weights: AttentionWeights,
    layout: Layout,
    *,
    head_dim: int,
    eps: float,
    kept: KeptRows | None = None,
    only: Tensor | None = None,
    inplace: bool = False,
    heads: int | None = None,
    scale: Scale = "offset",
) -> Tensor:
    """LayerNorm, attention over packed tokens, projection, LayerScale and the residual addition.

    Args:
        x: `[tokens, w]`, the residual stream; not modified unless `inplace`.
        weights: of the largest network.
        layout: `Sequences` or `Windows` of all tokens.
        head_dim: channels of a head.
        eps: of the norm.
        kept: the sequences, or maps, that take part; None means all.
        only: int64 `[live]`, distinct tokens that are wanted; the projection is made of these alone. Queries
            are made of all: leaving them out would take attention over ragged queries, for 0.4 % of a step of
            ViT-L/16 by the cost model.
        inplace: the result may overwrite `x`, which is not used elsewhere and is no leaf that requires
            gradients.
        heads: in use; default the share that `w` has of the largest width.
        scale: of both projections, as in `elastic_linear`.

    Returns:
        `[tokens, w]`, or with `only` `[live, w]`; the dtype of `x`.

    Raises:
        ValueError: the share of `w` is no whole number of heads, or as the operators it is made of.
        TypeError, RuntimeError: as those.

    Example:
        >>> import torch
        >>> from elastic_kernels import AttentionWeights, Sequences, elastic_attention_half
        >>> C, x = 32, torch.randn(10, 16)
        >>> weights = AttentionWeights(None, None, torch.randn(3 * C, C), None, torch.randn(C, C), None)
        >>> elastic_attention_half(x, weights, Sequences([(2, 5)]), head_dim=16, eps=1e-6).shape
        torch.Size([10, 16])
    """
    op, width = "elastic_attention_half", x.shape[-1]
    validate.matrix(op, x)
    heads = validate.heads(op, heads, weights.qkv_weight, head_dim, width)
    rows, row_scale = (kept.rows, kept.scale) if kept else (None, None)
    layout = layout.kept(kept) if kept else layout
    sizes, tokens = layout.sizes(), x.shape[0] if rows is None else rows.shape[0]
    if sizes is not None and sum(sizes) != tokens:
        raise ValueError(f"{op}: expected {tokens} tokens, got {sum(sizes)} in {sizes} of {layout}")
    fusable = sizes is not None and layout.is_fused
    if fusable and layout.backend(x, head_dim).backend == "triton" and _fused(op, x):
        return _attention_function(x, weights, layout, head_dim, eps, kept, only, inplace, heads, scale)
    h = elastic_layer_norm(x, weights.norm_weight, weights.norm_bias, eps, rows=rows)
    qkv = elastic_qkv(
        h, weights.qkv_weight, weights.qkv_bias, out_features=heads * head_dim, scale=scale
    ).unflatten(-1, (heads, head_dim))
    h = layout.attend(qkv, weights.qkv_bias)
    if only is not None:
        h, row_scale = _wanted(h, only, kept, x.shape[0])
        x, rows = x.index_select(0, only), None
    return elastic_linear_residual(
        h, weights.proj_weight, weights.proj_bias, x, weights.gamma,
        rows=rows, row_scale=row_scale, scale=scale,
    )  # fmt: skip


def _attention_specs(
    op: str, x: Tensor, w: AttentionWeights, inner: int, scale: Scale
) -> tuple[LayerSpec, LayerSpec]:
    """How the Triton kernels use the projections, with heads that are `inner` channels together."""
    (rows, largest), width = w.qkv_weight.shape, x.shape[1]
    if tuple(w.proj_weight.shape) != (largest, rows // 3):
        shapes = f"{tuple(w.qkv_weight.shape)} and {tuple(w.proj_weight.shape)}"
        raise ValueError(f"{op}: expected qkv_weight [3 * n, C] and proj_weight [C, n], got {shapes}")
    lengths = {"proj_bias": (w.proj_bias, largest), "gamma": (w.gamma, largest)}
    validate.vectors(op, x, qkv_bias=(w.qkv_bias, rows), **lengths)
    second = layer_spec(x, w.proj_weight, width, width=inner, scale=scale)
    return layer_spec(x, w.qkv_weight, inner, groups=3, scale=scale), second


def _attention_function(
    x: Tensor,
    weights: AttentionWeights,
    layout: Layout,
    head_dim: int,
    eps: float,
    kept: KeptRows | None,
    only: Tensor | None,
    inplace: bool,
    heads: int,
    scale: Scale,
) -> Tensor:
    from elastic_kernels.triton_ops.halves import AttentionHalfFunction, HalfSpec

    op, w = "elastic_attention_half", weights
    norm = (w.norm_weight, w.norm_bias)
    _validate(op, x, norm, {"qkv_weight": w.qkv_weight, "proj_weight": w.proj_weight}, kept)
    groups, windows, bias = layout.spec(heads)
    spec = HalfSpec(
        eps,
        *_attention_specs(op, x, w, heads * head_dim, scale),
        inplace,
        attention_groups=groups,
        head_dim=head_dim,
        windows=windows,
    )
    if only is not None:
        from elastic_kernels.triton_ops.last_half import LastAttentionFunction

        place, row_scale = kept.among(only, len(x)) if kept else (None, None)
        rows, places = (kept.rows, kept.places) if kept else (None, None)
        return LastAttentionFunction.apply(x, *weights, bias, rows, places, only, place, row_scale, spec)
    choice = (kept.rows, kept.scale, kept.places) if kept else (None, None, None)
    return AttentionHalfFunction.apply(x, *weights, bias, *choice, spec)


def elastic_mlp_half(
    x: Tensor,
    weights: MlpWeights,
    *,
    eps: float,
    kept: KeptRows | None = None,
    row_scale: Tensor | None = None,
    inplace: bool = False,
    hidden: int | None = None,
    scale: Scale = "offset",
    gate: bool = False,
) -> Tensor:
    """LayerNorm, MLP, LayerScale and the residual addition.

    Args:
        x: `[tokens, w]`, the residual stream; not modified unless `inplace`.
        weights: of the largest network.
        eps: of the norm.
        kept: the sequences that take part; None means all.
        row_scale: float32 `[tokens]`, without `kept`: a factor of each row's branch.
        inplace: as in `elastic_attention_half`.
        hidden, scale: as in `elastic_mlp`.
        gate: the MLP is `elastic_swiglu`; each operator is a call for autograd, not the half as one.

    Returns:
        `[tokens, w]`, the dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as the operators it is made of.

    Example:
        >>> import torch
        >>> from elastic_kernels import MlpWeights, elastic_mlp_half
        >>> weights = MlpWeights(None, None, torch.randn(64, 32), None, torch.randn(32, 64), None)
        >>> elastic_mlp_half(torch.randn(10, 16), weights, eps=1e-6).shape
        torch.Size([10, 16])
    """
    op, w = "elastic_mlp_half", weights
    validate.matrix(op, x)
    if kept and row_scale is not None:
        raise ValueError(f"{op}: expected kept or row_scale, got both")
    rows, row_scale = (kept.rows, kept.scale) if kept else (None, row_scale)
    if not gate and _fused(op, x):
        from elastic_kernels.triton_ops.halves import HalfSpec, MlpHalfFunction

        norm = (w.norm_weight, w.norm_bias)
        _validate(op, x, norm, {"fc1_weight": w.fc1_weight, "fc2_weight": w.fc2_weight}, kept)
        validate.vectors(op, x, row_scale=(row_scale, (x if rows is None else rows).shape[0]))
        validate.mlp(op, x, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias, w.gamma)
        hidden = active_hidden(op, hidden, w.fc1_weight, x.shape[1])
        spec = HalfSpec(eps, *mlp_specs(x, w.fc1_weight, w.fc2_weight, hidden, scale), inplace)
        places = kept.places if kept else None
        return MlpHalfFunction.apply(x, *weights, rows, row_scale, places, spec)
    h = elastic_layer_norm(x, w.norm_weight, w.norm_bias, eps, rows=rows)
    if gate:
        require_gated(op, w.fc1_weight, w.fc2_weight)
        h = gated_units(op, h, w.fc1_weight, w.fc1_bias, hidden, scale, "silu")
    else:
        hidden = active_hidden(op, hidden, w.fc1_weight, x.shape[1])
        h = elastic_linear(h, w.fc1_weight, w.fc1_bias, out_features=hidden, scale=scale, activation="gelu")
    return elastic_linear_residual(
        h, w.fc2_weight, w.fc2_bias, x, w.gamma, rows=rows, row_scale=row_scale, scale=scale
    )


def _wanted(h: Tensor, only: Tensor, kept: KeptRows | None, tokens: int) -> tuple[Tensor, Tensor | None]:
    """The rows of attention's output that belong to the tokens `only`, and their factors."""
    if kept is None:
        return h.index_select(0, only), None
    place, scale = kept.among(only, tokens)
    if not h.shape[0]:  # no sequence takes part; the parameters still get gradients, of zero
        h = F.pad(h, (0, 0, 0, 1))
    return h.index_select(0, place), scale


def _fused(op: str, x: Tensor) -> bool:
    """Whether every part of a half runs on Triton, so that its function can."""
    return layer_norm_backend(x).backend == linear_backend(op, x).backend == "triton"


def _validate(
    op: str,
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    layers: dict[str, Tensor],
    kept: KeptRows | None,
) -> None:
    longest = next(iter(layers.values())).shape[1]
    validate.prefix(op, "width", x.shape[1], longest)
    validate.operands(op, x=x, norm_weight=norm[0], **layers)
    if norm[0] is not None:
        validate.vectors(op, x, norm_weight=(norm[0], longest), norm_bias=(norm[1], longest))
    if kept is not None:
        count = kept.rows.shape[0]
        given = {"row_scale": (kept.scale, count), "places": (kept.places, x.shape[0])}
        validate.vectors(op, x, rows=(kept.rows, count), **given)
