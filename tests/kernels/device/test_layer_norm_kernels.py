"""The Triton LayerNorm on a device."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels.layouts import places_of
from elastic_kernels.triton_ops.layer_norm import branch_room
from elastic_kernels.triton_ops.vector_grads import affine_gradients
from helpers.kernels.layer_norm_cases import EPS, affine, assert_accurate, run
from helpers.kernels.numerics import DTYPES, assert_all_as_good, draw
from helpers.kernels.sizes import RUNS, sized

pytestmark = pytest.mark.cuda

WIDTHS, LARGEST = sized(([384, 640, 1024, 1000, 2048, 4096], 4096), ([100, 200, 520, 1100, 2100], 2110))
TOKENS, KEPT = sized((4099, 3001), (133, 101))
# Tokens, and how many of them are normalised.
ROWS: dict[str, tuple[int, int | None]] = {
    "all-rows": (TOKENS, None),
    "some-rows": (TOKENS, KEPT),
    "one-row": (1, None),
    "no-rows": (0, None),
    "no-kept-rows": (5, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", ROWS)
def test_forward_and_gradients(case: str, width: int, with_affine: bool, dtype: torch.dtype) -> None:
    tokens, kept = ROWS[case]
    assert_accurate(tokens, width, LARGEST, kept, with_affine, dtype, "cuda", RUNS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_normalised_rows_instead_of_the_stream(width: int, dtype: torch.dtype) -> None:
    """As half-blocks do it, with stochastic depth: x may be overwritten, and gets its gradient added.

    Rows of that are left for the branch before.
    """
    rows = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))[:KEPT].cuda()
    x, dsum = (draw(TOKENS, width, seed=n).to("cuda", dtype) for n in (0, 5))
    dy = draw(KEPT, width, seed=4).to("cuda", dtype)
    weight, bias = (p.to("cuda", dtype) for p in affine(width, LARGEST))
    operators = torch.ops.elastic_kernels
    y, xhat, _, rstd = operators.layer_norm_fwd(x, weight, bias, EPS, rows, dtype, True)
    places = places_of(rows, TOKENS)
    others, scale = rows.flip(0)[: KEPT // 2], torch.rand(KEPT // 2, device="cuda")
    branch, sums = branch_room(x, len(others), dtype, True)
    left = (branch, sums, places_of(others, TOKENS), scale)
    dx, partials = operators.layer_norm_bwd(dy, None, xhat, weight, None, rstd, places, dsum, *left)
    expected = dx[others].float() * scale[:, None]
    assert torch.equal(branch, expected.to(dtype))
    torch.testing.assert_close(sums.sum((0, 1)), expected.sum(0), rtol=1e-4, atol=1e-4)
    ours = y, dx, *affine_gradients(partials, weight)
    parameters = (weight.double(), bias.double())
    truth = run(x.double(), parameters, rows, dy.double(), "reference")
    torchs = run(x, (weight, bias), rows, dy, "reference")
    truth[1], torchs[1] = truth[1] + dsum.double(), torchs[1] + dsum
    assert_all_as_good(ours, torchs, truth)
