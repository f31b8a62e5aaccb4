"""The Triton prototype losses and Sinkhorn passes on a GPU, at real sizes."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, draw
from prototype_cases import Case, assert_accurate, assert_sinkhorn, run

from elastic_kernels import sinkhorn_scaling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CASES = {
    "head": Case(640, 8192, 256, teacher_rows=128),
    "odd": Case(67, 1001, 40, teacher_rows=9),
    "one-student": Case(129, 2048, 256, students=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dtype, dtype, "cuda")
    inputs = {name: t.cuda() for name, t in CASES[case].inputs(dtype, dtype).items()}
    first, second = (run(inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn(dtype: torch.dtype) -> None:
    assert_sinkhorn(draw(1001, 8192).tanh().to("cuda", dtype))


def test_nothing_waits_for_the_device() -> None:
    logits = [draw(n, 1024).half().cuda() for n in (17, 600)]
    sinkhorn_scaling(logits, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sinkhorn_scaling(logits, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
