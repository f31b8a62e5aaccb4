"""The Triton kernels of unit rows under Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels.triton_ops.unit_rows  # noqa: F401, registers the operators
from elastic_kernels import unit_rows
from helpers.kernels.numerics import DTYPES, draw, opcheck
from helpers.kernels.unit_rows_cases import assert_accurate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(19, 40), (1, 300), (0, 8)])
def test_output_and_gradients(rows: int, width: int, gain: bool, dtype: torch.dtype) -> None:
    assert_accurate(rows, width, gain, dtype)


def test_registered_operators() -> None:
    ops = torch.ops.elastic_kernels
    x = draw(3, 8).float()
    for gain in (None, torch.ones(3, 1)):
        opcheck((ops.unit_rows_fwd, (x, gain, torch.float16)))
        opcheck((ops.unit_rows_bwd, (x, x, gain)))


def test_wide_rows_are_refused() -> None:
    with pytest.raises(RuntimeError, match="widths up to 4096, got 4097"):
        unit_rows(torch.zeros(1, 4097))
