"""The Triton kernels of the embedding on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.embedding_cases import assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import sized

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "largest", "crops"), [*sized([(640, 1024, 128)], [(130, 144, 17)]), (33, 33, 3)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_and_gradients(masked: bool, width: int, largest: int, crops: int, dtype: torch.dtype) -> None:
    assert_accurate(width, largest, 1, masked, dtype, "cuda", crops)
