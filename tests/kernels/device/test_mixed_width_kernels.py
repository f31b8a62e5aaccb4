"""Rows that have widths of their own, on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.mixed_width_cases import LINEARS, NORMS, Case, assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEARS + NORMS, ids=str)
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    form, options, rows = case
    assert_accurate((form, options, rows if rows < 2 else sized(1031, 131)), dtype, "cuda")
