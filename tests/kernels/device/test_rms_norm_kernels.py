"""The Triton RMSNorm on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.numerics import DTYPES
from helpers.kernels.rms_norm_cases import assert_accurate
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("sizes", [sized((4099, 1000), (131, 130)), (1, 16)], ids=str)
def test_forward_and_gradients(sizes: tuple[int, int], gather: bool, dtype: torch.dtype) -> None:
    assert_accurate(sizes, gather, dtype, "cuda")
