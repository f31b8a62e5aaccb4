"""Rows of length one, or of a trained length.

    y = x / max(|x|, 1e-12),  or with a gain  y = g x / |x|

The Triton kernels are in `triton_ops/unit_rows.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.layer_norm import layer_norm_backend


def unit_rows(x: Tensor, gain: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Divide rows by their Euclidean norm, and multiply each by a gain.

    Args:
        x: `[rows, d]`, floating point.
        gain: `[rows, 1]`, of the dtype of `x`, or None for 1.
        dtype: of the result; default that of `x`. The rows are divided in it or in that of `x`, whichever is
            wider.

    Returns:
        `[rows, d]`. Rows of zeros stay so without a gain; with one they are undefined.

    Raises:
        ValueError: `x` is no matrix, or `gain` of another shape or device.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: on Triton sums are fp32. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import unit_rows
        >>> unit_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])
    """
    op, dtype = "unit_rows", dtype or x.dtype
    if x.dim() != 2:
        raise ValueError(f"{op}: expected x [rows, d], got {tuple(x.shape)}")
    if gain is not None and gain.shape != (len(x), 1):
        raise ValueError(f"{op}: expected gain {(len(x), 1)}, got {tuple(gain.shape)}")
    validate.operands(op, x=x, gain=gain)
    if layer_norm_backend(x, op).backend == "triton":
        from elastic_kernels.triton_ops.unit_rows import UnitRowsFunction

        return UnitRowsFunction.apply(x, gain, dtype)
    with dispatch.without_autocast(x.device):
        wide = x.to(torch.promote_types(x.dtype, dtype))
        if gain is None:
            return F.normalize(wide, dim=-1, eps=1e-12).to(dtype)
        return (wide * (gain / wide.norm(dim=1, keepdim=True))).to(dtype)
