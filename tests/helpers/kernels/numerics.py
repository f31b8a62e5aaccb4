"""Random inputs, poisoned outputs and the error rule of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

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


def poisoned(active: Tensor, *shape: int) -> Tensor:
    """A leaf that is NaN outside of its leading corner, which must be all that is read."""
    full = torch.full(shape, torch.nan, dtype=active.dtype)
    full[tuple(slice(0, n) for n in active.shape)] = active
    return full.requires_grad_()


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


def assert_all_as_good(ours: Iterable[Tensor], torchs: Iterable[Tensor], truth: Iterable[Tensor]) -> None:
    """Results in order, in PyTorch's dtypes."""
    for number, (mine, theirs, exact) in enumerate(zip(ours, torchs, truth, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert_as_good_as_torch(mine, theirs, exact, f"result {number}")


def assert_kernels_accurate(
    run: Callable[[str, torch.dtype], Sequence[Tensor]], dtype: torch.dtype
) -> Sequence[Tensor]:
    """What `run(backend, dtype)` gives: kernels beside the definition, and that in float64 as the truth."""
    ours = run("triton", dtype)
    assert_all_as_good(ours, run("reference", dtype), run("reference", torch.float64))
    return ours


def opcheck(*calls: tuple[Callable, tuple]) -> None:
    """Schema, meta tensors and autograd of registered operators, each with arguments."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=checks)
