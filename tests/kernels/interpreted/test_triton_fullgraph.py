"""Every public operator compiles in one graph around its Triton kernels; modules: `test_fullgraph.py`."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels as ek
from helpers.kernels.fullgraph_cases import CASES, assert_compiles


@pytest.mark.parametrize("case", [case for case in CASES if case[0].islower()])
def test_compiled_equals_eager(case: str) -> None:
    assert_compiles(case)


@pytest.mark.parametrize(
    "block", [ek.ElasticBlock(64, 96, 16), ek.ElasticSwinBlock(64, 96, 16, 2, 1)], ids=type
)
@torch.no_grad()
def test_a_graph_of_inference_serves_every_width(block: torch.nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    groups = [(2, 5)] if isinstance(block, ek.ElasticBlock) else [(2, 1, 5)]
    for width in (32, 64):
        x = torch.randn(10, width)
        assert torch.equal(compiled(x, groups), block(x, groups))
