"""Products whose rows have widths of their own, on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.mixed_width_cases import assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "rows"), [("offset", sized(1031, 131)), (None, 1)])
def test_forward_and_gradients(scale: object, rows: int, dtype: torch.dtype) -> None:
    assert_accurate(dtype, scale, rows, "cuda")
