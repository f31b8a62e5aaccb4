"""RMSNorm and the gate of SwiGLU under Triton's interpreter; the gate also in `test_triton_linear.py`."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels.triton_ops import layer_norm, swiglu
from helpers.kernels.numerics import DTYPES, draw, opcheck
from helpers.kernels.rms_norm_cases import assert_accurate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("sizes", [(0, 16), (1, 5), (67, 130)], ids=str)
def test_forward_and_gradients(sizes: tuple[int, int], gather: bool, dtype: torch.dtype) -> None:
    assert_accurate(sizes, gather, dtype)


def test_registered_operators() -> None:
    assert layer_norm.LayerNormFunction and swiglu.SwiGLUFunction  # importing registers
    ops, x, weight = torch.ops.elastic_kernels, draw(6, 5).float(), draw(9).float()
    index = torch.tensor([4, 0])
    places = torch.tensor([1, -1, -1, -1, 0, -1], dtype=torch.int32)
    opcheck(
        (ops.layer_norm_fwd, (x, weight, None, 1e-6, None, torch.float16)),
        (ops.layer_norm_fwd, (x, weight, None, 1e-6, index, torch.float32, False, None, False)),
        (ops.layer_norm_fwd, (x, weight, None, 1e-6, None, torch.float32, False, index.new_ones(6))),
        (ops.layer_norm_bwd, (x[:2], x, None, weight, None, torch.ones(2), places, None)),
        (ops.swiglu_fwd, (draw(3, 2, 7).float(), "silu")),
        (ops.swiglu_bwd, (draw(3, 2, 7).float(), draw(3, 7).float(), "gelu")),
    )
