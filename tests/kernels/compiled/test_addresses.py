"""Tensors of more than 2^31 elements: offsets of rows are 64 bits wide, in compiled kernels."""

from __future__ import annotations

import re

import pytest

from benchmarks import kernel_report


def cases(*forms: str) -> dict[str, kernel_report.Case]:
    """Those of Hopper in fp16, by name."""
    return {
        case.key.replace("\t", " "): case
        for case in kernel_report.cases()
        if case.part == 90 and case.dtype == "fp16" and any(form in case.form for form in forms)
    }


STRIDED, PACKED = cases("prototypes", "window"), cases("groups of")


@pytest.mark.parametrize("case", STRIDED)
def test_rows_are_addressed_with_64_bits(case: str) -> None:
    """Every product of a row number and the stride of rows is one of 64-bit integers."""
    ttir = STRIDED[case].compile().ttir
    loaded = re.search(r"(%\w+) = tt\.addptr %stride_ptr,", ttir)
    if loaded:  # the stride comes out of a table
        (name,) = re.findall(rf"(%\w+) = tt\.load {loaded[1]}\b.*: !tt\.ptr<i64>", ttir)
        assert not re.findall(rf"arith\.trunci {name}\b", ttir)
        assert re.findall(rf"tt\.splat {name} : i64", ttir)
        return
    stride = re.findall(r"arith\.extsi %(stride_t\w*) : i32 to i64", ttir)
    assert stride, "the stride is never widened"
    assert not re.findall(r"tt\.splat %stride_t\w* : i32", ttir)


@pytest.mark.parametrize("case", PACKED)
def test_samples_are_addressed_with_64_bits(case: str) -> None:
    """Every product with the positions of a sample, and of a position and the channels."""
    ttir = PACKED[case].compile().ttir
    assert re.search(r"arith\.extsi %rows : i32 to i64", ttir)
    # The values of a group are counted in 32 bits.
    assert set(re.findall(r"arith\.muli %rows, (%\w+) : i32", ttir)) == {"%per_group"}
    (channels,) = re.findall(r"(%\w+) = arith\.muli %groups, %per_group : i32", ttir)
    assert re.search(rf"arith\.extsi {channels} : i32 to i64", ttir)
    for narrow in re.findall(rf"(%\w+) = tt\.splat {channels} : i32", ttir):
        assert not re.search(rf"arith\.muli [^:\n]*{narrow}\b", ttir)
