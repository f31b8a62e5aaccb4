"""The Triton attention on a GPU, at real sizes."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Groups, active_heads, run
from numerics import DTYPES, assert_as_good_as_torch, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CASES: dict[str, Groups] = {
    "vit-l-crops": [(8, 197), (32, 37)],
    "one-row": [(1, 1)],
    "odd": [(3, 33)],
    "long": [(2, 1024)],
    "edges": [(1, 64), (1, 65), (1, 128), (1, 129), (1, 256), (1, 257)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(case: str, dim: int, dtype: torch.dtype) -> None:
    groups = CASES[case]
    qkv = active_heads(groups, dim, heads=6).to("cuda", dtype)[:, :, :6]
    dout = draw(qkv.shape[0], 6 * dim, seed=1).to("cuda", dtype)
    truth = run(qkv.double(), groups, dout.double(), "reference")
    ours, again, torchs = (run(qkv, groups, dout, name) for name in ("triton", "triton", "reference"))
    for a, r, b, t in zip(ours, again, torchs, truth, strict=True):
        assert_as_good_as_torch(a, b, t)
        assert torch.equal(a, r)
