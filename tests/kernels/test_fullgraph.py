"""Every public operator compiles in one graph, in its plain definition."""

from __future__ import annotations

import pytest
import torch

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


@torch.no_grad()
def test_one_graph_serves_every_width() -> None:
    torch._dynamo.reset()
    block, graphs = elastic_kernels.ElasticBlock(64, 96, 16, gate=True), []

    def counted(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counted)
    for width in (32, 48, 64):
        x = torch.randn(10, width)
        torch.testing.assert_close(compiled(x, [(2, 5)]), block(x, [(2, 5)]))
    assert len(graphs) <= 2  # another of the largest, whose scale is 1
