"""The Triton window attention on a device."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels.triton_ops.window_attention as kernels
from helpers.kernels.attention_cases import PARTIAL_DIMS
from helpers.kernels.numerics import DTYPES, draw
from helpers.kernels.sizes import gpu_only, sized
from helpers.kernels.window_attention_cases import Maps, assert_accurate, inputs, run

pytestmark = pytest.mark.cuda

SWIN: Maps = [(16, 24, 24), (4, 56, 56)]  # a few crops of Swin-B's first stage
CASES: dict[str, tuple[Maps, int]] = sized(
    {
        "swin-b": (SWIN, 7),
        "last-stage": ([(33, 3, 3), (9, 7, 7)], 7),
        "windows-of-8": ([(5, 16, 24)], 8),
        "odd": ([(3, 13, 29), (2, 1, 1)], 4),
    },
    {
        "swin-b": ([(2, 6, 9), (1, 14, 8)], 7),
        "last-stage": ([(3, 3, 3), (2, 7, 7)], 7),
        "windows-of-8": ([(1, 8, 11)], 8),
        "odd": ([(2, 5, 9), (2, 1, 1)], 4),
    },
) | {"no-rows": ([(0, 4, 4)], 2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64])
@pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, shifted: bool, dim: int, dtype: torch.dtype) -> None:
    maps, window = CASES[case]
    assert_accurate(maps, window, window // 2 if shifted else 0, dtype, dim, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", PARTIAL_DIMS)
def test_heads_that_do_not_fill_their_tile(dim: int, dtype: torch.dtype) -> None:
    maps, window = CASES["odd"]
    assert_accurate(maps, window, window // 2, dtype, dim, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_of_a_slice_are_summed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than windows: each adds up the gradients of several."""
    monkeypatch.setattr(kernels, "SLICED_PROGRAMS", 4)
    assert_accurate([(2, 5, 9), (1, 4, 4)], 4, 2, dtype, device="cuda")


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat(dtype: torch.dtype) -> None:
    qkv, bias, pad = inputs(SWIN, 7, heads=4)
    leaves = (qkv.to("cuda", dtype), bias.float().cuda(), pad.to("cuda", dtype))
    dout = draw(len(qkv), 64, seed=3).to("cuda", dtype)
    first, second = (run(leaves, SWIN, 7, 3, dout, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
