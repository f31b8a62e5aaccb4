"""Norms and the rotary embedding of queries and keys on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.numerics import DTYPES
from helpers.kernels.qk_norm_cases import FORMS, Form, assert_accurate
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_gradients(form: Form, dtype: torch.dtype) -> None:
    assert_accurate(sized((1031, 6, 64), (19, 3, 64)), form, dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 16), *sized([(517, 12, 80), (517, 16, 112)], [(9, 17, 80), (5, 9, 112)])], ids=str
)
def test_sizes(sizes: tuple[int, int, int]) -> None:
    for form in (("rms", "neighbours"), ("layer", "halves")):
        assert_accurate(sizes, form, torch.bfloat16)
