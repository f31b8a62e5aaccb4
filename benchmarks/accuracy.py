"""The error rule of tests and benchmarks: as good as PyTorch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rounding of a result near 1


def excess_error(ours: Tensor, torchs: Tensor, truth: Tensor, factor: float = 2.0) -> str | None:
    """What is wrong with a result, or None; ours and PyTorch's have one dtype, the truth is float64.

    The largest error may be `factor` times that of PyTorch's result, plus rounding of the largest value. NaN
    in PyTorch's result allows nothing.
    """
    if ours.shape != truth.shape:
        return f"expected shape {tuple(truth.shape)}, got {tuple(ours.shape)}"
    if not truth.numel():
        return None
    error = (ours.double() - truth).abs().nan_to_num(torch.inf)
    rounding = STORAGE[ours.dtype] * max(float(truth.abs().max()), 1.0)
    limit = factor * float((torchs.double() - truth).abs().nan_to_num(0.0, torch.inf).max()) + rounding
    if float(error.max()) <= limit:
        return None
    worst = int(error.argmax())
    return f"worst element {worst}: {ours.flatten()[worst]} against {truth.flatten()[worst]}, limit {limit}"
