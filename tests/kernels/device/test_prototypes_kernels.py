"""The Triton prototype losses and Sinkhorn passes on a device."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels import sinkhorn_scaling
from helpers.kernels.numerics import DTYPES, draw
from helpers.kernels.prototype_cases import (
    Case,
    assert_accurate,
    assert_gradients_are_not_rounded,
    assert_sinkhorn,
    run,
)
from helpers.kernels.sizes import RUNS, gpu_only, sized

pytestmark = pytest.mark.cuda

CASES = sized(
    {
        "head": Case(640, 8192, 256, teacher_rows=128, targets=1),
        "odd": Case(67, 1001, 40, teacher_rows=9),
        "one-student": Case(129, 2048, 256, students=1),
    },
    {
        "head": Case(130, 528, 72, teacher_rows=9, targets=1),
        "odd": Case(67, 301, 40, teacher_rows=9),
        "one-student": Case(35, 260, 33, students=1),
    },
) | {"one-row": Case(1, 40, 16), "no-rows": Case(0, 40, 16)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dtype, dtype, "cuda")
    inputs = {name: t.cuda() for name, t in CASES[case].inputs(dtype, dtype).items()}
    first, *again = (run(inputs, "triton") for _ in range(RUNS))
    assert all(torch.equal(first[name], other[name]) for other in again for name in first)


@pytest.mark.parametrize("operands", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("students", [1, 2])
def test_gradients_of_fp32_inputs_are_not_rounded(students: int, operands: torch.dtype) -> None:
    case = Case(*sized((640, 65_536, 256), (67, 520, 33)), students=students)
    assert_gradients_are_not_rounded(case, operands, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn(dtype: torch.dtype) -> None:
    assert_sinkhorn(draw(*sized((1001, 8192), (521, 1104))).tanh().to("cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_of_several_problems(dtype: torch.dtype) -> None:
    """In one launch: without rows, of one row, and with strided rows at odd addresses."""
    wide = draw(70, 300).tanh().to("cuda", dtype)
    problems = [wide[:0], wide[:1, :130], wide[3:, 7:270]]
    together = sinkhorn_scaling(problems, 0.1)
    for ours, problem in zip(together, problems, strict=True):
        torch.testing.assert_close(ours, sinkhorn_scaling([problem.contiguous()], 0.1)[0])


@gpu_only
def test_nothing_waits_for_the_device() -> None:
    logits = [draw(n, 1024).half().cuda() for n in (17, 600)]
    sinkhorn_scaling(logits, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sinkhorn_scaling(logits, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_more_logits_than_32_bits_can_count() -> None:
    """Rows beyond 2^31 elements are read where they are."""
    rows, prototypes = 33_000, 65_536
    if torch.cuda.mem_get_info()[0] < 3 * rows * prototypes * 2:
        pytest.skip("needs 13 GB of GPU memory")
    t = torch.zeros(rows, prototypes, dtype=torch.float16, device="cuda")
    t[-1, -1] = 1.0
    ops = torch.ops.elastic_kernels
    table = ops.sinkhorn_table([t])
    log_v = ops.sinkhorn_rows([t], table, torch.zeros(prototypes, device="cuda"), 0.1)
    expected = -torch.logsumexp(t[-1].double() / 0.1, 0)
    torch.testing.assert_close(log_v[-1].double(), expected)
    largest, _ = ops.sinkhorn_columns([t], table, None, 0.1)
    assert float(largest[-1]) == pytest.approx(10.0)
    assert float(largest[0]) == 0.0
