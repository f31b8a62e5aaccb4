"""Every Triton kernel compiled without a GPU for every kind of part: limits, and the committed table."""

from __future__ import annotations

import pytest
import triton

from benchmarks import kernel_report

COMMITTED = kernel_report.TABLE.read_text().splitlines()
VERSION = f"# Triton {triton.__version__}"


@pytest.fixture(scope="module")
def built() -> tuple[list[str], dict[str, list[str]]]:
    return kernel_report.build()


def test_no_kernel_spills_or_exceeds_a_limit(built: tuple[list[str], dict[str, list[str]]]) -> None:
    lines, wrong = built
    assert len(lines) == 2 + len(kernel_report.cases())
    assert not wrong


@pytest.mark.skipif(COMMITTED[0] != VERSION, reason=f"the committed table is of {COMMITTED[0][2:]}")
def test_the_committed_table_is_up_to_date(built: tuple[list[str], dict[str, list[str]]]) -> None:
    """After a change that is meant: `python -m benchmarks.kernel_report --write`."""
    assert built[0] == COMMITTED


def test_complaints() -> None:
    """A kernel that is wrong in every way is called so."""
    case = next(c for c in kernel_report.cases() if c.matrix and c.part == 90 and c.dtype == "bf16")
    bad = kernel_report.Compiled(90, 8, 255, 8, 300_000, "ld.global.b32 %r1, [%rd1];", "")
    assert case.complaints(bad) == [
        "spills 8 bytes",
        "needs 300000 bytes of shared memory, the part has 232448",
        "0 blocks fit, meant were 1",
        "no wgmma instruction",
    ]
    row_case = next(c for c in kernel_report.cases() if c.rows)
    tensor = kernel_report.Compiled(80, 4, 32, 0, 0, "mma.sync.aligned.m16n8k16 ...;", "")
    assert row_case.complaints(tensor) == [
        "unwanted matrix instructions {'mma': 1}",
        "no accesses of 16 bytes",
    ]
