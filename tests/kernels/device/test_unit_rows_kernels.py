"""The Triton kernels of unit rows on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized
from helpers.kernels.unit_rows_cases import assert_accurate

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("rows", "width"), [*sized([(8192, 256)], [(19, 256)]), (7, 33), (1, 600)])
def test_output_and_gradients(rows: int, width: int, gain: bool, dtype: torch.dtype) -> None:
    assert_accurate(rows, width, gain, dtype, "cuda")
