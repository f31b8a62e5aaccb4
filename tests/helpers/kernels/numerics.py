"""Random inputs, poisoned outputs and the error rule of the kernel tests."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import excess_error
from elastic_kernels import dispatch

DTYPES = [torch.float32, torch.float16]
if os.environ.get("TRITON_INTERPRET") != "1":  # whose bf16 is wrong; the sanitiser executes it as compiled
    DTYPES.append(torch.bfloat16)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` allocates with NaN: kernels must write all of it."""
    empty = torch.empty

    def poisoned(*size, **options) -> Tensor:
        tensor = empty(*size, **options)
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor, label: str = "result") -> None:
    """Our error is at most twice that of PyTorch in the same dtype, plus rounding of the result.

    Triton's interpreter truncates to bfloat16 where a GPU rounds, which doubles the error.
    """
    factor = 4 if dispatch.INTERPRETED and ours.dtype == torch.bfloat16 else 2
    wrong = excess_error(ours, torchs, truth, factor)
    assert wrong is None, f"{label}: {wrong}"
