"""The Triton window attention under Triton's interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels.triton_ops.window_attention as kernels
from elastic_kernels import window_attention
from helpers.kernels.attention_cases import PARTIAL_DIMS
from helpers.kernels.numerics import draw, opcheck
from helpers.kernels.window_attention_cases import Maps, assert_accurate, inputs, run

CASES: list[tuple[Maps, int]] = [
    ([(2, 4, 4)], 2),
    ([(1, 5, 3), (2, 2, 2)], 3),
    ([(2, 1, 1)], 4),
    ([(1, 3, 7), (0, 4, 4)], 2),
    ([(1, 8, 9)], 7),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize(("maps", "window"), CASES, ids=str)
def test_forward_and_gradients(maps: Maps, window: int, shifted: bool, dtype: torch.dtype) -> None:
    assert_accurate(maps, window, window // 2 if shifted else 0, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, *PARTIAL_DIMS])
def test_other_heads(dim: int, dtype: torch.dtype) -> None:
    assert_accurate([(1, 5, 3)], 3, 1, dtype, dim=dim)


def test_windows_of_a_slice_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than windows: each adds up the gradients of several."""
    monkeypatch.setattr(kernels, "SLICED_PROGRAMS", 4)
    assert_accurate([(2, 5, 3), (1, 4, 4)], 2, 1, torch.float32)


def test_strides() -> None:
    maps: Maps = [(1, 4, 3)]
    leaves = tuple(torch.nan_to_num(t).float() for t in inputs(maps, 3))
    dout = draw(32, 12, seed=3).float().t()
    turned = (
        leaves[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        leaves[1].mT.contiguous().mT,
        leaves[2],
    )
    assert turned[0].stride(-1) != 1 and turned[1].stride(-1) != 1
    strided, plain = (run(t, maps, 3, 1, dout, "triton") for t in (turned, leaves))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_no_tokens_and_no_padding() -> None:
    bias = torch.zeros(2, 4, 4)
    assert window_attention(torch.zeros(0, 3, 2, 16), bias, None, [(0, 4, 4)], window=2).shape == (0, 32)
    qkv = draw(3, 3, 2, 16).float()
    zeros = window_attention(qkv, bias, torch.zeros(3, 2, 16), [(1, 1, 3)], window=2, shift=1)
    assert torch.equal(window_attention(qkv, bias, None, [(1, 1, 3)], window=2, shift=1), zeros)


@pytest.mark.parametrize(
    ("dim", "window", "message"), [(16, 9, "windows up to 8, got 9"), (136, 2, "head_dim up to 128, got 136")]
)
def test_too_large_windows_and_heads_are_refused_when_forced(dim: int, window: int, message: str) -> None:
    bias = torch.zeros(2, window**2, window**2)
    with pytest.raises(RuntimeError, match=message):
        window_attention(draw(4, 3, 2, dim).float(), bias, None, [(1, 2, 2)], window=window)


def test_registered_operators() -> None:
    ops = torch.ops.elastic_kernels
    bias, geometry = draw(2, 9, 9).float(), ([1, 5, 4], 3, 1, -100.0)
    opcheck((ops.window_bias_tiles, (bias, 3)))
    tensors = draw(20, 3, 2, 16).float(), ops.window_bias_tiles(bias, 3), draw(3, 2, 16).float()
    out, lse = ops.window_attention_fwd(*tensors, *geometry)
    for keep in (True, False):
        opcheck((ops.window_attention_fwd, (*tensors, *geometry, keep)))
    opcheck((ops.window_attention_bwd, (*tensors, lse, out, *geometry)))
