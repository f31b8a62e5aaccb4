"""The Triton group norm on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.group_norm_cases import FUSION_NAMES, FUSIONS, assert_accurate, run
from helpers.kernels.layer_norm_cases import affine
from helpers.kernels.numerics import DTYPES, draw
from helpers.kernels.sizes import gpu_only, sized

pytestmark = pytest.mark.cuda

SHAPES = sized(
    [(4, 56, 56, 64), (3, 24, 24, 96), (5, 14, 14, 1024), (7, 3, 3, 2048)],  # of ResNet-152
    [(2, 5, 7, 64), (3, 11, 7, 96), (2, 1, 1, 320), (1, 7, 5, 2048), (0, 2, 2, 64)],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "added"), FUSIONS, ids=FUSION_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(
    shape: tuple[int, ...], activation: str | None, added: bool, dtype: torch.dtype
) -> None:
    assert_accurate(shape, 32, dtype, activation, added, "cuda")


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat(dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    x, dy, residual = (draw(*shape, seed=seed).to("cuda", dtype) for seed in range(3))
    parameters = tuple(p.float().cuda() for p in affine(shape[-1], 128))
    first, second = (run(x, parameters, 32, residual, "relu", dy, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
