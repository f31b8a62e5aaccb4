"""Several MLPs on the same rows on Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels import elastic_head_mlps
from helpers.kernels.head_mlps_cases import assert_accurate
from helpers.kernels.numerics import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 0])
def test_outputs_and_gradients(rows: int, dtype: torch.dtype) -> None:
    assert_accurate(rows, dtype, scale=0.5 if dtype == torch.float16 else "offset")


def test_layers_that_do_not_fit_are_refused() -> None:
    layers = [(torch.zeros(4, 8), None), (torch.zeros(2, 3), None)]
    with pytest.raises(ValueError, match=r"elastic_head_mlps: expected width in 1..3, got 4"):
        elastic_head_mlps(torch.zeros(1, 8), [layers])
