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
    loaded = re.search(r"(%\w+) = tt\.addptr %stride_ptr,", ttir)
    if loaded:  # the stride comes out of a table
        (name,) = re.findall(rf"(%\w+) = tt\.load {loaded[1]}\b.*: !tt\.ptr<i64>", ttir)
        assert not re.findall(rf"arith\.trunci {name}\b", ttir)
        assert re.findall(rf"tt\.splat {name} : i64", ttir)
        return
    stride = re.findall(r"arith\.extsi %(stride_t\w*) : i32 to i64", ttir)
    assert stride, "the stride is never widened"
    assert not re.findall(r"tt\.splat %stride_t\w* : i32", ttir)
