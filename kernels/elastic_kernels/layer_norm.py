"""Elastic LayerNorm: statistics over the active channels, a prefix of the affine parameters.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight[:w] + bias[:w]          w = x.shape[-1]

Source: POA (Zhang et al., ECCV 2024), section 3.2; official `DynamicLayerNorm`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import validate


def elastic_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Normalise rows over their own width, with the first entries of a shared affine.

    Args:
        x: `[tokens, w]` or, without `rows`, `[..., w]`.
        weight, bias: `[w_max]`; only the first `w` entries are read.
        eps: added to the variance.
        rows: int64 `[kept]`; normalise only these rows, in this order (stochastic depth).

    Returns:
        `[kept, w]` (or the shape of `x`).

    Raises:
        ValueError: `w` is wider than the affine parameters.
        TypeError: tensors of different dtypes outside autocast.

    Example:
        >>> import torch
        >>> elastic_layer_norm(torch.randn(5, 32), torch.ones(64), torch.zeros(64), 1e-6).shape
        torch.Size([5, 32])
    """
    width = x.shape[-1]
    validate.prefix("elastic_layer_norm", "width", width, weight.shape[0])
    validate.same_dtype("elastic_layer_norm", x=x, weight=weight, bias=bias)
    if rows is not None:
        x = x.index_select(0, rows)
    return F.layer_norm(x, (width,), weight[:width], bias[:width], eps)
