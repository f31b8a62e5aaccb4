"""Norms and the rotary embedding of queries and keys under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels as ek
from elastic_kernels.triton_ops import qk_norm
from helpers.kernels.numerics import DTYPES, draw, opcheck
from helpers.kernels.qk_norm_cases import FORMS, Form, assert_accurate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_gradients(form: Form, dtype: torch.dtype) -> None:
    assert_accurate((7, 3, 10), form, dtype)


@pytest.mark.parametrize("sizes", [(0, 2, 16), (1, 1, 2), (2, 9, 112)], ids=str)
def test_sizes(sizes: tuple[int, int, int]) -> None:
    """No tokens; one pair; more heads than a tile has, and heads that do not fill it."""
    for form in (("rms", "neighbours"), ("layer", "halves")):
        assert_accurate(sizes, form, torch.float32)


def test_limits() -> None:
    assert ek.qk_norm(draw(2, 3, 1, 4).float(), rotary=ek.Rotary.of_grid(1, 2, 4)).shape == (2, 3, 1, 4)
    with pytest.raises(RuntimeError, match="even head_dim up to 128, got 5"):
        ek.qk_norm(draw(2, 3, 1, 5).float(), torch.ones(2, 5))
    angles = ek.Rotary(torch.zeros(2, 4, requires_grad=True), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="no gradient of the angles"):
        ek.qk_norm(draw(2, 3, 1, 4).float(), rotary=angles)


def test_registered_operators() -> None:
    assert qk_norm.QkNormFunction  # importing registers
    ops, qkv = torch.ops.elastic_kernels, draw(5, 3, 2, 6).float()
    two, one = torch.ones(2, 6), torch.ones(5, 6)
    opcheck(
        (ops.qk_norm_fwd, (qkv, two, two, one, one, 1e-6, True)),
        (ops.qk_norm_fwd, (qkv, None, None, one, one, 1e-6, False)),
        (ops.qk_norm_bwd, (qkv, qkv, two, None, None, 1e-6, False, True)),
        (ops.qk_norm_bwd, (qkv, qkv, None, one, one, 1e-6, False, False)),
    )
