"""The Triton attention on a device."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.attention_cases import PARTIAL_DIMS, Groups, active_heads, run
from helpers.kernels.numerics import DTYPES, assert_as_good_as_torch, draw
from helpers.kernels.sizes import RUNS, sized

pytestmark = pytest.mark.cuda

CASES: dict[str, Groups] = sized(
    {
        "vit-l-crops": [(8, 197), (32, 37)],
        "odd": [(3, 33)],
        "long": [(2, 1024)],
        "edges": [(1, 64), (1, 65), (1, 128), (1, 129), (1, 256), (1, 257)],
    },
    {
        "vit-l-crops": [(1, 197), (2, 37)],
        "odd": [(0, 9), (3, 33)],
        "long": [(1, 261)],
        "edges": [(1, 64), (1, 65), (1, 129)],
    },
) | {"one-row": [(1, 1)], "no-rows": [(0, 9)]}
HEADS = sized(6, 2)
DIMS = (16, 32, 64, 128)
# Long sequences of wide heads are too much for the sanitiser's check of races.
FORMS = [(case, dim) for case in CASES for dim in sized(DIMS, DIMS[:3] if case == "long" else DIMS)] + [
    ("odd", dim) for dim in PARTIAL_DIMS
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "dim"), FORMS)
def test_forward_and_gradient(case: str, dim: int, dtype: torch.dtype) -> None:
    groups = CASES[case]
    qkv = active_heads(groups, dim, HEADS).to("cuda", dtype)[:, :, :HEADS]
    dout = draw(qkv.shape[0], HEADS * dim, seed=1).to("cuda", dtype)
    truth = run(qkv.double(), groups, dout.double(), "reference")
    ours, *again = (run(qkv, groups, dout, "triton") for _ in range(RUNS))
    for a, b, t in zip(ours, run(qkv, groups, dout, "reference"), truth, strict=True):
        assert_as_good_as_torch(a, b, t)
    assert all(torch.equal(a, r) for other in again for a, r in zip(ours, other, strict=True))
