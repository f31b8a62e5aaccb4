"""Tensors of more than 2^31 elements: offsets of rows are 64 bits wide, in compiled kernels."""

from __future__ import annotations

import re

import pytest

from benchmarks.assembly import Compiled
from benchmarks.kernel_report import Case

STRIDED = (
    "losses_fwd", "losses_bwd", "row_pass", "column_pass", "window_attention_fwd", "window_attention_bwd",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(cases: list[Case]) -> dict[str, str]:
    """One of each that steps on Hopper launch, by name, as Triton's first form."""
    hopper = [case for case in cases if case.run[1:] == ("bf16", "sm_90")]
    binaries = {case.binary.name.strip("_").removesuffix("_kernel"): case.binary for case in hopper}
    wanted = (*STRIDED, "group_norm_fwd", "group_norm_bwd")
    return {name: Compiled.of(binaries[name]).ttir for name in wanted}


@pytest.mark.parametrize("name", STRIDED)
def test_rows_are_addressed_with_64_bits(name: str, kernels: dict[str, str]) -> None:
    """Every product of a row number and the stride of rows is one of 64-bit integers."""
    ttir = kernels[name]
    loaded = re.search(r"(%\w+) = tt\.addptr %stride_ptr,", ttir)
    if loaded:  # the stride comes out of a table
        (name,) = re.findall(rf"(%\w+) = tt\.load {loaded[1]}\b.*: !tt\.ptr<i64>", ttir)
        assert not re.findall(rf"arith\.trunci {name}\b", ttir)
        assert re.findall(rf"tt\.splat {name} : i64", ttir)
        return
    stride = re.findall(r"arith\.extsi %(stride_t\w*) : i32 to i64", ttir)
    assert stride, "the stride is never widened"
    assert not re.findall(r"tt\.splat %stride_t\w* : i32", ttir)


@pytest.mark.parametrize("name", ["group_norm_fwd", "group_norm_bwd"])
def test_samples_are_addressed_with_64_bits(name: str, kernels: dict[str, str]) -> None:
    """Every product with the positions of a sample, and of a position and the channels."""
    ttir = kernels[name]
    assert re.search(r"arith\.extsi %rows : i32 to i64", ttir)
    # The values of a group are counted in 32 bits.
    assert set(re.findall(r"arith\.muli %rows, (%\w+) : i32", ttir)) == {"%per_group"}
    (channels,) = re.findall(r"(%\w+) = arith\.muli %groups, %per_group : i32", ttir)
    assert re.search(rf"arith\.extsi {channels} : i32 to i64", ttir)
    for narrow in re.findall(rf"(%\w+) = tt\.splat {channels} : i32", ttir):
        assert not re.search(rf"arith\.muli [^:\n]*{narrow}\b", ttir)
