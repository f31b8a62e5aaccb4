"""Several MLPs on the same rows on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.head_mlps_cases import assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", sized([4099, 1], [131]))
def test_outputs_and_gradients(rows: int, dtype: torch.dtype) -> None:
    assert_accurate(rows, dtype, "cuda", 0.5 if dtype == torch.float16 else "offset")
