"""What is promised of every operator: gradients under autocast; second derivatives of plain definitions."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels as ek
from helpers.kernels.fullgraph_cases import CASES
from helpers.kernels.numerics import draw


@pytest.mark.parametrize("case", CASES)
def test_autocast_leaves_gradients_the_dtype_of_their_parameters(case: str) -> None:
    torch.manual_seed(0)
    function, leaves = CASES[case]()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = function(*leaves)
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for exact, low in zip(*results, strict=True):
        assert low.dtype == torch.float32
        # Eight bits of each product; of a sum of outputs, too.
        torch.testing.assert_close(low, exact, rtol=0, atol=0.1 * float(exact.detach().abs().max()))


def test_plain_definitions_have_second_derivatives() -> None:
    torch.manual_seed(0)
    block, x = ek.ElasticBlock(6, 8, 2, layer_scale=0.5, gate=True).double(), draw(3, 4).requires_grad_()
    weights = tuple(p for p in block.parameters() if p.dim() == 1)
    torch.autograd.gradgradcheck(lambda x, *_: block(x, [(1, 3)]), (x, *weights), atol=1e-4)
