"""Every public operator compiles in one graph, in its plain definition."""

from __future__ import annotations

import pytest

import elastic_kernels
from elastic_kernels import backend
from helpers.kernels.fullgraph_cases import CASES, NO_OPERATORS, assert_compiles


def test_every_public_name_is_tried_or_is_no_operator() -> None:
    tried = {case.partition(" ")[0] for case in CASES}
    assert sorted([*tried, *NO_OPERATORS]) == sorted(elastic_kernels.__all__)


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case: str) -> None:
    with backend("reference"):
        assert_compiles(case)
