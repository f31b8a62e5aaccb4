"""Elastic linear layers: a matrix product with a prefix of a shared weight.

    y = s * x W[:out, :in]^T + b[:out]          s = in_max / in, 1, or any number

`W[out_max, in_max]` belongs to the largest network; a subnet of width `in` reads the top-left corner of
it in place. POA's offset scale `s = in_max / in` keeps the magnitude of the sum when fewer channels take
part; slimmable networks, MatFormer and the like have none. It is the `alpha` of the matrix product, never a
pass over activations, and the bias is not scaled.

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicLinear`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.kept_activations import keeps_activations
from elastic_kernels.shared_gradients import current_ledger

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.layers import LayerSpec

Scale = float | Literal["offset"] | None
"""The factor of a product: a number, "offset" for in_max / in, or None for 1."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def elastic_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    scale: Scale = "offset",
    activation: str | None = None,
) -> Tensor:
    """Multiply by the top-left corner of a shared weight: `act(s * x W[:out, :in]^T + b[:out])`.

    Args:
        x: `[..., in]`, floating point; its last dimension chooses the columns of `weight`.
        weight: `[out_max, in_max]`, any strides; only `weight[:out_features, :in]` is read.
        bias: `[out_max]` or None; only `bias[:out_features]` is read, and it is not scaled.
        out_features: rows of `weight` in use; default all.
        scale: the factor `s`: "offset" is `in_max / in`, which is 1 for the largest network; None is 1.
        activation: None, "silu", "gelu_tanh", or "gelu", the exact one, with erf. Triton fuses them; there,
            in half precision, the exact one's normal distribution function is off by up to 1.1e-5, and 1.1e-3
            of itself in the lower tail.

    Returns:
        `[..., out_features]`, the dtype of the matrix product (autocast applies as to `torch.addmm`).

    Raises:
        ValueError: a width outside the weight, or mismatched shapes.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: fp32 sums; the weight's gradient is rounded once, to the dtype of `weight`. Results repeat
    bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_linear
        >>> W, b = torch.randn(64, 48), torch.zeros(64)
        >>> elastic_linear(torch.randn(5, 32), W, b, out_features=40).shape
        torch.Size([5, 40])
    """
    width, rows = x.shape[-1], weight.shape[0] if out_features is None else out_features
    validate.prefix("elastic_linear", "in", width, weight.shape[1])
    validate.prefix("elastic_linear", "out_features", rows, weight.shape[0])
    validate.operands("elastic_linear", x=x, weight=weight, bias=bias)
    validate.vectors("elastic_linear", x, bias=(bias, weight.shape[0]))
    if activation is not None:
        validate.one_of("elastic_linear", "activation", activation, ACTIVATIONS)
    if linear_backend("elastic_linear", x).backend == "triton":
        from elastic_kernels.triton_ops.layers import LinearFunction

        spec = layer_spec(x, weight, rows, scale=scale)
        y = LinearFunction.apply(x.reshape(-1, width), weight, bias, spec, activation)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)  # a view could not be overwritten
    bias = None if bias is None else bias[:rows]
    y = _scaled_linear(x, weight[:rows, :width], bias, factor(scale, weight.shape[1], width))
    return y if activation is None else ACTIVATIONS[activation](y)


def elastic_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
    scale: Scale = "offset",
) -> Tensor:
    """Apply an elastic linear, LayerScale and the residual addition of half of a block.

    `out = residual; out[rows] += row_scale * gamma[:w] * (s * x W[:w, :in]^T + b[:w])`

    Args:
        x: `[kept, in]`, the rows that take part.
        weight, bias, scale: as in `elastic_linear`; the output width is that of `residual`.
        residual: `[tokens, w]`; keeps its dtype, is not modified.
        gamma: `[w_max]` LayerScale or None.
        rows: int64 `[kept]`, distinct rows of `residual` that `x` stands for (stochastic depth); None means
            all of them in order.
        row_scale: float32 `[kept]` factor of each row (the inverse of its keep rate); None means 1.

    Returns:
        `[tokens, w]`, the dtype of `residual`.

    Raises:
        ValueError: `x` has another number of rows than `rows` (or `residual`), or as in `elastic_linear`.
        TypeError, RuntimeError: as in `elastic_linear`.

    Numerics: as of `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_linear_residual
        >>> x, W, r = torch.randn(2, 8), torch.randn(16, 16), torch.zeros(4, 8)
        >>> elastic_linear_residual(x, W, None, r, rows=torch.tensor([0, 3])).shape
        torch.Size([4, 8])
    """
    validate.branch_rows("elastic_linear_residual", x, residual, rows, row_scale)
    validate.prefix("elastic_linear_residual", "in", x.shape[1], weight.shape[1])
    validate.prefix("elastic_linear_residual", "width", residual.shape[1], weight.shape[0])
    validate.operands("elastic_linear_residual", x=x, weight=weight, bias=bias)
    lengths = {"bias": (bias, weight.shape[0]), "gamma": (gamma, weight.shape[0])}
    validate.vectors("elastic_linear_residual", x, **lengths)
    if linear_backend("elastic_linear_residual", x).backend == "triton":
        from elastic_kernels.triton_ops.layers import LinearResidualFunction

        spec = layer_spec(x, weight, residual.shape[1], scale=scale)
        return LinearResidualFunction.apply(x, weight, bias, residual, gamma, rows, row_scale, spec)
    branch = elastic_linear(x, weight, bias, out_features=residual.shape[-1], scale=scale)
    if gamma is not None:
        branch = branch * gamma[: residual.shape[-1]]
    if row_scale is not None:
        branch = branch * row_scale.unsqueeze(-1)
    branch = branch.to(residual.dtype)
    return residual + branch if rows is None else residual.index_add(0, rows, branch)


def elastic_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out_features: int | None = None,
    scale: Scale = "offset",
) -> Tensor:
    """Project to queries, keys and values of the first heads: `y[:, g] = s * x W[g, :n, :w]^T + b[g, :n]`.

    `weight` is seen as three stacked matrices; heads that lie first in each of q, k and v are used.

    Args:
        x: `[tokens, w]`.
        weight: `[3 * n_max, w_max]`, the rows of q, then k, then v; `n_max` is `w_max` unless the heads
            are wider or narrower together.
        bias: `[3 * n_max]` or None.
        out_features: `n` of each of q, k and v, of all heads together; default the share `n_max * w / w_max`.
        scale: as in `elastic_linear`.

    Returns:
        `[tokens, 3, n]`, perhaps a strided view.

    Raises:
        ValueError: `weight` is not three matrices, `w` is wider than them, or its share of `n_max` is no
            whole number.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: as of `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_qkv
        >>> elastic_qkv(torch.randn(5, 32), torch.randn(3 * 48, 48), torch.zeros(3 * 48)).shape
        torch.Size([5, 3, 32])
    """
    if weight.shape[0] % 3:
        raise ValueError(f"elastic_qkv: expected weight [3 * heads * d, C], got {tuple(weight.shape)}")
    validate.prefix("elastic_qkv", "width", x.shape[-1], weight.shape[1])
    rows = validate.share("elastic_qkv", "out_features", out_features, weight, 3, x.shape[-1])
    return stacked_linear("elastic_qkv", x, weight, bias, 3, rows, scale)


def stacked_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, rows: int, scale: Scale
) -> Tensor:
    """`[tokens, w]` -> `[tokens, groups, rows]`: the first rows of each matrix stacked in a weight."""
    validate.matrix(op, x)
    validate.operands(op, x=x, weight=weight, bias=bias)
    validate.vectors(op, x, bias=(bias, weight.shape[0]))
    if linear_backend(op, x).backend == "triton":
        from elastic_kernels.triton_ops.layers import LinearFunction

        spec = layer_spec(x, weight, rows, scale=scale, groups=groups)
        return LinearFunction.apply(x, weight, bias, spec, None)
    s = factor(scale, weight.shape[1], x.shape[-1])
    corner = weight.unflatten(0, (groups, -1))[:, :rows, : x.shape[-1]]
    if groups * rows == weight.shape[0]:
        return _scaled_linear(x, corner.flatten(0, 1), bias, s).unflatten(-1, (groups, rows))
    columns = corner.transpose(1, 2)
    tokens = x.expand(groups, *x.shape)
    if bias is None:
        return (torch.bmm(tokens, columns) * s).transpose(0, 1)
    offset = bias.view(groups, 1, -1)[..., :rows]
    return torch.baddbmm(offset, tokens, columns, alpha=s).transpose(0, 1)


def linear_backend(op: str, x: Tensor) -> dispatch.Choice:
    """The backend that an elastic linear layer, or the op built of such, takes for an input, and why."""
    return dispatch.choose(op, x, dtype=dispatch.product_dtype(x))


def layer_spec(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    width: int | None = None,
    scale: Scale = "offset",
    groups: int = 1,
) -> LayerSpec:
    """How the Triton kernels use a weight for inputs `width` wide (default: as `x`) in the dtype of `x`."""
    from elastic_kernels.triton_ops.layers import LayerSpec

    width = width or x.shape[-1]
    s, ledger = factor(scale, weight.shape[1], width), current_ledger()
    if not (torch.is_grad_enabled() and weight.requires_grad):
        ledger = None
    if ledger is not None and (groups * out_features, width) == tuple(weight.shape):
        ledger.expect(weight)
    key = 0 if ledger is None else id(weight)  # which torch.compile cannot take of a view
    dtype, trains = dispatch.product_dtype(x), torch.is_grad_enabled()
    return LayerSpec(groups, out_features, s, dtype, ledger, key, trains, keeps_activations())


def factor(scale: Scale, largest: int, width: int) -> float:
    """The value of a scale where `width` of the `largest` input features are in use."""
    if isinstance(scale, str) and scale != "offset":
        raise ValueError(f"scale: expected 'offset', None or a number, got {scale!r}")
    return 1.0 if scale is None else largest / width if isinstance(scale, str) else float(scale)


def _scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if scale == 1.0:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if bias is None:
        y = torch.addmm(flat.new_zeros(weight.shape[0]), flat, weight.t(), beta=0, alpha=scale)
    else:
        y = torch.addmm(bias, flat, weight.t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])
