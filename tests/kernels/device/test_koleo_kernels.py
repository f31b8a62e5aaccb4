"""The Triton kernels of KoLeo on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.koleo_cases import assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*sized([128], [14]), 2])
def test_loss_and_gradients(rows: int, dtype: torch.dtype) -> None:
    assert_accurate([(rows, 600), (rows, 33)], 2, dtype, "cuda")
