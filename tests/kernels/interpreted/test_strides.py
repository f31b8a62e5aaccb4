"""Every public operator on strided tensors under Triton's interpreter; no call changes its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.kernels.fullgraph_cases import CASES

OF_MODULES = ("mixed_width_attention", "mixed_width_mlp", "mixed_width_block")  # which hold the parameters
OPERATORS = [case for case in CASES if case[0].islower()]


def strided(tensor: Tensor) -> Tensor:
    """The same values, with NaN between them."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0].detach().requires_grad_()


@pytest.mark.parametrize("case", OPERATORS)
def test_strides_of_matrices_change_nothing_and_calls_leave_their_inputs(case: str) -> None:
    torch.manual_seed(0)
    function, leaves = CASES[case]()
    leaves = leaves[:1] if case in OF_MODULES else leaves
    before = [leaf.detach().clone() for leaf in leaves]
    results = []
    for inputs in (leaves, [strided(leaf) if leaf.dim() > 1 else leaf for leaf in leaves]):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    torch.testing.assert_close(*results)
    assert all(torch.equal(leaf, kept) for leaf, kept in zip(leaves, before, strict=True))


@pytest.mark.parametrize("case", [case for case in OPERATORS if case not in OF_MODULES])
def test_vectors_of_another_stride_are_refused(case: str) -> None:
    function, leaves = CASES[case]()
    for place in [place for place, leaf in enumerate(leaves) if leaf.dim() == 1]:
        inputs = [strided(leaf) if at == place else leaf for at, leaf in enumerate(leaves)]
        with pytest.raises(ValueError, match=r"of stride 1, as contiguous\(\) gives, got 2"):
            function(*inputs)
