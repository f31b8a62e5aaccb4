"""The Triton LayerNorm on a GPU, at real sizes."""

from __future__ import annotations

import pytest
import torch
from layer_norm_cases import affine, run
from numerics import DTYPES, assert_as_good_as_torch, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 640, 1024, 1000])
@pytest.mark.parametrize("gather", [False, True], ids=["all-rows", "some-rows"])
def test_forward_and_gradients(width: int, gather: bool, dtype: torch.dtype) -> None:
    tokens = 4099
    rows = torch.randperm(tokens)[:3001].cuda() if gather else None
    x = draw(tokens, width).to("cuda", dtype)
    dy = draw(3001 if gather else tokens, width, seed=4).to("cuda", dtype)
    parameters = tuple(p.to("cuda", dtype) for p in affine(width, 1024))
    truth = run(x.double(), tuple(p.double() for p in parameters), rows, dy.double(), "reference")
    ours, again, torchs = (run(x, parameters, rows, dy, n) for n in ("triton", "triton", "reference"))
    for a, r, b, t in zip(ours, again, torchs, truth, strict=True):
        assert_as_good_as_torch(a, b, t)
        assert torch.equal(a, r)
