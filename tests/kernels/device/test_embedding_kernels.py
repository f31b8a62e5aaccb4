"""The Triton kernels of the embedding on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.embedding_cases import LAYERS, assert_accurate, assert_layer_accurate
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_patches_and_1x1_convolutions(kind: str, dtype: torch.dtype) -> None:
    assert_layer_accurate(kind, dtype, "cuda")
