"""Rows times prototypes pass 2^31 elements: offsets of rows are 64 bits wide, in compiled kernels."""

from __future__ import annotations

import re

import pytest

from benchmarks import kernel_report

CASES = {
    case.key.replace("\t", " "): case
    for case in kernel_report.cases()
    if case.part == 90 and case.dtype == "fp16" and "prototypes" in case.form
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_addressed_with_64_bits(case: str) -> None:
    """Every product of a row number and the logits' stride is one of 64-bit integers."""
    ttir = CASES[case].compile().ttir
    stride = re.findall(r"arith\.extsi %(stride_t\w*) : i32 to i64", ttir)
    assert stride, "the stride is never widened"
    assert not re.findall(r"tt\.splat %stride_t\w* : i32", ttir)
