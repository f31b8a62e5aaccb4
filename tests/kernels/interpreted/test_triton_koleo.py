"""The Triton kernels of KoLeo under Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels.triton_ops.koleo  # noqa: F401, registers the operators
from elastic_kernels import backend, koleo
from helpers.kernels.koleo_cases import assert_accurate
from helpers.kernels.numerics import DTYPES, draw, opcheck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shapes", "groups"), [([(18, 40), (6, 70)], 2), ([(7, 8)], 1), ([(2, 33), (3, 8)], 1)]
)
def test_loss_and_gradients(shapes: list[tuple[int, int]], groups: int, dtype: torch.dtype) -> None:
    assert_accurate(shapes, groups, dtype)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_rows_without_a_neighbour_and_equal_rows(name: str) -> None:
    """A row alone has a loss of 0, and rows that are equal a gradient of 0."""
    alone, none, twins = (t.float().requires_grad_() for t in (draw(1, 8), draw(0, 8), torch.ones(2, 8)))
    with backend(name):
        assert koleo(alone, none) == 0
        loss = koleo(alone, none, twins)
    loss.backward()
    assert not any(x.grad.any() for x in (alone, none))
    assert twins.grad.isfinite().all() and loss > 10


def test_registered_operators() -> None:
    ops = torch.ops.elastic_kernels
    x = [draw(4, 8).float(), draw(6, 3).float()]
    for keep in (True, False):
        opcheck((ops.koleo_fwd, (x, 2, keep)))
    saved = ops.koleo_fwd(x, 2)[1:]
    opcheck((ops.koleo_bwd, (x, torch.ones(()), *saved, 2)))
