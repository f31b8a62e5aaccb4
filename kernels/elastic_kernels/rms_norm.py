"""Elastic RMSNorm: the root mean square of the active channels, a prefix of the weight.

    y = x / sqrt(mean(x^2) + eps) * weight[:w]          w = x.shape[-1]

The Triton kernels are those of LayerNorm. Source: Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import validate
from elastic_kernels.layer_norm import layer_norm_backend


def elastic_rms_norm(x: Tensor, weight: Tensor, eps: float, *, rows: Tensor | None = None) -> Tensor:
    """Divide rows by the root mean square of their own width, with the first entries of a shared weight.

    Args:
        x: `[tokens, w]` or, without `rows`, `[..., w]`.
        weight: `[w_max]`; only the first `w` entries are read.
        eps: added to the mean square.
        rows: int64 `[kept]`, distinct; normalise only these rows, in this order (stochastic depth).

    Returns:
        `[kept, w]` (or the shape of `x`), the wider dtype of `x` and `weight`.

    Raises:
        ValueError: `w` is wider than the weight.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: sums are fp32. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_rms_norm
        >>> elastic_rms_norm(torch.randn(5, 32), torch.ones(64), 1e-6).shape
        torch.Size([5, 32])
    """
    op, width = "elastic_rms_norm", x.shape[-1]
    validate.prefix(op, "width", width, weight.shape[0])
    validate.operands(op, x=x, weight=weight)
    validate.vectors(op, x, weight=(weight, weight.shape[0]))
    validate.chosen_rows(op, x, rows)
    if layer_norm_backend(x, op).backend == "triton":
        from elastic_kernels.triton_ops.layer_norm import LayerNormFunction

        flat = x if rows is not None else x.reshape(-1, width)
        y = LayerNormFunction.apply(flat, weight, None, eps, rows, None, torch.is_grad_enabled())
        return y if rows is not None else y.view(x.shape)
    return F.rms_norm(x if rows is None else x.index_select(0, rows), (width,), weight[:width], eps)
