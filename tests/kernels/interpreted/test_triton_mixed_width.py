"""Products whose rows have widths of their own, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels.triton_ops import mixed_width
from helpers.kernels.mixed_width_cases import assert_accurate
from helpers.kernels.numerics import DTYPES, draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "rows"), [("offset", 67), (None, 1), (0.5, 0)])
def test_forward_and_gradients(scale: object, rows: int, dtype: torch.dtype) -> None:
    assert_accurate(dtype, scale, rows)


def test_registered_operator() -> None:
    assert mixed_width.MixedWidthFunction  # importing registers
    x, weight, widths = draw(5, 16).float(), draw(8, 16).float(), torch.arange(1, 6)
    operator = torch.ops.elastic_kernels.mixed_width_product
    for arguments in (
        (x, weight, None, widths, widths, None),
        (x, weight, draw(8).float(), widths, widths, x[:, 0]),
    ):
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(operator, arguments, test_utils=checks)
