"""Rows that have widths of their own, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels.triton_ops import mixed_width
from helpers.kernels.mixed_width_cases import LINEARS, NORMS, Case, assert_accurate
from helpers.kernels.numerics import DTYPES, draw, opcheck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEARS + NORMS, ids=str)
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    assert_accurate(case, dtype)


def test_registered_operators() -> None:
    assert mixed_width.MixedWidthFunction  # importing registers
    ops, x, weight = torch.ops.elastic_kernels, draw(5, 16).float(), draw(3, 8, 16).float()
    widths = torch.arange(1, 6)
    opcheck(
        (ops.mixed_width_fwd, (x, weight, None, widths, widths, None, "silu", True)),
        (ops.mixed_width_fwd, (x, weight, draw(24).float(), widths, widths, x[:, 0], "", False)),
        (ops.mixed_width_dgrad, (draw(5, 3, 8).float(), weight, widths, widths, x[:, 0])),
    )
