"""Elastic LayerNorm: statistics over the active channels, a prefix of the affine parameters.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight[:w] + bias[:w]          w = x.shape[-1]

optionally of chosen rows.

The Triton kernels are in `triton_ops/layer_norm.py`.

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicLayerNorm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate

MAX_WIDTH = 4096  # of the Triton kernel


def elastic_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, rows: Tensor | None = None
) -> Tensor:
    """Normalise rows over their own width, with the first entries of a shared affine.

    Args:
        x: `[tokens, w]` or, without `rows`, `[..., w]`.
        weight, bias: `[w_max]`, or None both; only the first `w` entries are read.
        eps: added to the variance.
        rows: int64 `[kept]`, distinct; normalise only these rows, in this order (stochastic depth).

    Returns:
        `[kept, w]` (or the shape of `x`), the wider dtype of `x` and `weight`.

    Raises:
        ValueError: `w` is wider than the affine parameters, or only one of them is given.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: statistics and sums are fp32. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_layer_norm
        >>> elastic_layer_norm(torch.randn(5, 32), torch.ones(64), torch.zeros(64), 1e-6).shape
        torch.Size([5, 32])
    """
    _validate(x, weight, bias)
    validate.chosen_rows("elastic_layer_norm", x, rows)
    width = x.shape[-1]
    if layer_norm_backend(x).backend == "triton":
        from elastic_kernels.triton_ops.layer_norm import LayerNormFunction

        flat = x if rows is not None else x.reshape(-1, width)
        y = LayerNormFunction.apply(flat, weight, bias, eps, rows, None, torch.is_grad_enabled())
        return y if rows is not None else y.view(x.shape)
    return _reference(x if rows is None else x.index_select(0, rows), weight, bias, eps)


def _validate(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    op = "elastic_layer_norm"
    if (weight is None) != (bias is None):
        raise ValueError(f"{op}: expected weight and bias both or neither, got one of them")
    if weight is not None:
        validate.prefix(op, "width", x.shape[-1], weight.shape[0])
    validate.operands(op, x=x, weight=weight, bias=bias)
    if weight is not None:
        validate.vectors(op, x, weight=(weight, weight.shape[0]), bias=(bias, weight.shape[0]))


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1]
    if weight is None or bias is None:
        return F.layer_norm(x, (width,), eps=eps)
    return F.layer_norm(x, (width,), weight[:width], bias[:width], eps)


def layer_norm_backend(x: Tensor, op: str = "elastic_layer_norm") -> dispatch.Choice:
    """The backend that `elastic_layer_norm`, or another op of rows of its widths, takes, and why."""
    width = x.shape[-1]
    limit = f"the kernel takes widths up to {MAX_WIDTH}, got {width}" if width > MAX_WIDTH else None
    return dispatch.choose(op, x, limit)
