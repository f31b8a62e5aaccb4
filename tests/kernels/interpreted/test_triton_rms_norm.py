"""RMSNorm and the gate of SwiGLU under Triton's interpreter; the gate also in `test_triton_linear.py`."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels.triton_ops import rms_norm, swiglu
from helpers.kernels.numerics import DTYPES, draw
from helpers.kernels.rms_norm_cases import assert_accurate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("sizes", [(0, 16), (1, 5), (67, 130)], ids=str)
def test_forward_and_gradients(sizes: tuple[int, int], gather: bool, dtype: torch.dtype) -> None:
    assert_accurate(sizes, gather, dtype)


def test_registered_operators() -> None:
    assert rms_norm.RmsNormFunction and swiglu.SwiGLUFunction  # importing registers
    ops, x, weight, index = (
        torch.ops.elastic_kernels,
        draw(6, 5).float(),
        draw(9).float(),
        torch.tensor([4, 0]),
    )
    calls = [
        (ops.rms_norm_fwd, (x, weight, None, 1e-6, torch.float16)),
        (ops.rms_norm_fwd, (x, weight, index, 1e-6, torch.float32)),
        (ops.rms_norm_bwd, (x[:2], x, weight, index, torch.ones(2))),
        (ops.swiglu_fwd, (draw(3, 2, 7).float(), "silu")),
        (ops.swiglu_bwd, (draw(3, 2, 7).float(), draw(3, 7).float(), "gelu")),
    ]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=checks)
