"""The Triton attention on a device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from elastic_kernels.triton_ops import attention
from helpers.kernels.attention_cases import PARTIAL_DIMS, Groups, assert_accurate
from helpers.kernels.numerics import DTYPES
from helpers.kernels.sizes import RUNS, sized

pytestmark = pytest.mark.cuda

CASES: dict[str, Groups] = sized(
    {
        "vit-l-crops": [(8, 197), (32, 37)],
        "odd": [(3, 33)],
        "long": [(2, 1024)],
        "longest": [(1, 4096)],
        "edges": [(1, 64), (1, 65), (1, 128), (1, 129), (1, 256), (1, 257)],
    },
    {
        "vit-l-crops": [(1, 197), (2, 37)],
        "odd": [(0, 9), (3, 33)],
        "long": [(1, 261)],
        "longest": [(1, 66)],
        "edges": [(1, 64), (1, 65), (1, 129)],
    },
) | {"one-row": [(1, 1)], "no-rows": [(0, 9)]}
compare = partial(assert_accurate, name="triton", heads=sized(6, 2), device="cuda", runs=RUNS)
DIMS = (16, 32, 64, 128)
# Long sequences of wide heads are too much for the sanitiser's check of races.
FORMS = [(case, dim) for case in CASES for dim in sized(DIMS, DIMS[:3] if case == "long" else DIMS)] + [
    ("odd", dim) for dim in PARTIAL_DIMS
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "dim"), FORMS)
def test_forward_and_gradient(
    case: str, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "longest":
        monkeypatch.setattr(attention, "LONGEST_OF_ONE_PROGRAM", sized(1024, 64))
    compare(CASES[case], dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (32, 80))
def test_sequences_that_begin_at_offsets(dim: int, dtype: torch.dtype) -> None:
    groups = sized([(1, 1), (3, 700), (1, 4096), (1, 0), (5, 37)], [(1, 1), (1, 70), (1, 0), (2, 5)])
    compare(groups, dim, dtype, by_offsets=True)


@pytest.mark.parametrize("by_offsets", [False, True])
def test_nothing_is_read_of_absent_heads(by_offsets: bool) -> None:
    case = sized([(3, 197), (2, 37)], [(2, 5), (2, 67)])
    compare(case, 32, torch.float16, by_offsets=by_offsets, absent=True)
