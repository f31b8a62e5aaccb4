"""Every public operator compiles in one graph around its Triton kernels."""

from __future__ import annotations

import pytest

from helpers.kernels.fullgraph_cases import CASES, assert_compiles


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case: str) -> None:
    assert_compiles(case)
