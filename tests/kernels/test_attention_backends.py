"""The other backends behind `packed_attention`, held to the numbers of the reference."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from elastic_kernels import backend, dispatch, elastic_linear, packed_attention
from elastic_kernels.attention import attention_backend
from helpers.kernels.attention_cases import Groups, assert_accurate
from helpers.kernels.numerics import DTYPES

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="about the process without an interpreter")

CASES: dict[str, Groups] = {
    "one-row": [(1, 1)],
    "two-classes": [(2, 37), (3, 5)],
    "197": [(2, 197)],
    "empty-group": [(0, 9), (2, 3)],
    "no-rows": [(0, 9)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sdpa(case: str, dtype: torch.dtype) -> None:
    with backend("sdpa"):
        assert attention_backend(torch.empty(1, dtype=dtype), CASES[case], 16) == ("sdpa", "forced")
    assert_accurate(CASES[case], 16, dtype, "sdpa")


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_xformers_on_cuda(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], 64, dtype, "xformers", "cuda")


def test_forced_xformers_never_falls_back() -> None:
    missing = importlib.util.find_spec("xformers") is None
    reason = "xformers is not installed" if missing else "the tensors are on 'cpu', expected cuda"
    with backend("xformers"), pytest.raises(RuntimeError, match=f"xformers, which was forced, but {reason}"):
        packed_attention(torch.zeros(4, 3, 2, 16), [(1, 4)])


def test_backends_of_attention_leave_other_operators_alone() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    plain = elastic_linear(x, weight)
    with backend("xformers"):
        assert torch.equal(elastic_linear(x, weight), plain)
