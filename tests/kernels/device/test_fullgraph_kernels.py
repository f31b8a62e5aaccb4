"""Every public operator compiles in one graph around its Triton kernels, on a GPU."""

from __future__ import annotations

import pytest

from elastic_kernels import backend
from helpers.kernels.fullgraph_cases import CASES, assert_compiles
from helpers.kernels.sizes import gpu_only

pytestmark = [pytest.mark.cuda, gpu_only]


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case: str) -> None:
    with backend("triton"):
        assert_compiles(case, "cuda")
