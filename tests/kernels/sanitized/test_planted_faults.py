"""The sanitiser catches faults that are planted into kernels, by cases that the kernels pass without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from triton.runtime.jit import JITFunction
from ttsem.sanitize import KernelFault

from elastic_kernels.triton_ops import layer_norm, optimizer, sinkhorn
from helpers.kernels import layer_norm_cases, optimizer_cases, prototype_cases
from helpers.kernels.numerics import draw
from helpers.kernels.sanitizer import complaints, entry_kernels


def norm() -> None:
    layer_norm_cases.assert_accurate(133, 100, 100, None, True, torch.float32, "cuda")


def scale() -> None:
    prototype_cases.assert_sinkhorn(draw(5, 33).float().cuda())


def step() -> None:
    optimizer_cases.assert_accurate("cuda")


NORM, BACK = layer_norm._layer_norm_fwd_kernel, layer_norm._layer_norm_bwd_kernel
UPDATE, ROW_PASS = optimizer._adamw_kernel, sinkhorn._row_pass_kernel


class Fault(NamedTuple):
    """A run, the kernel that is changed and how, what ttsem calls it, and the tensor that it names."""

    run: Callable[[], None]
    kernel: JITFunction
    right: str
    wrong: str
    kind: str
    tensor: str


FAULTS = {
    "store-without-mask": Fault(norm, NORM, "mean, mask=mask_r)", "mean)", "oob_write", "mean_ptr"),
    "load-without-mask": Fault(
        norm, BACK, "offs_k, mask=mask_k, other=0.0).to(tl.float32)\n", "offs_k)\n", "oob_read", "weight_ptr"
    ),
    "two-programs-on-a-row": Fault(norm, BACK, "program.to(", "(program // 2).to(", "race", "partials_ptr"),
    "one-column-too-many-by-address": Fault(
        scale, ROW_PASS, "(offs_k < prototypes)[", "(offs_k <= prototypes)[", "oob_read", r"logits_ptr\[0\]"
    ),
    "no-mask-by-address": Fault(
        step, UPDATE, "first + CHUNK <= numel", "first < numel", "oob_read", r"params_ptr\[0\]"
    ),
    "two-programs-on-a-chunk-by-address": Fault(
        step, UPDATE, "to(tl.int64) * CHUNK", "to(tl.int64) * (CHUNK // 2)", "race", r"\w+_ptr\[\d\]"
    ),
}  # fmt: skip

Plant = Callable[[JITFunction, str, str], None]


@pytest.fixture
def plant() -> Iterator[Plant]:
    """Changes a line of a kernel until the test ends."""
    sources: dict[JITFunction, str] = {}

    def change(kernel: JITFunction, right: str, wrong: str) -> None:
        sources[kernel] = kernel.src
        assert kernel.src.count(right) == 1
        kernel._unsafe_update_src(kernel.src.replace(right, wrong))

    yield change
    for kernel, source in sources.items():
        kernel._unsafe_update_src(source)


@pytest.mark.parametrize("name", FAULTS)
def test_caught(name: str, plant: Plant) -> None:
    """In the right kernel, with its line and tensor."""
    run, kernel, right, wrong, kind, tensor = FAULTS[name]
    run()
    plant(kernel, right, wrong)
    with pytest.raises(KernelFault) as caught:
        run()
    fault, file = caught.value.fault, Path(kernel.fn.__code__.co_filename)
    assert (fault.kernel, fault.kind) == (kernel.__name__, kind)
    assert re.search(rf"{file.name}:\d+: .*`{tensor}`", str(caught.value))


def test_an_output_that_is_not_written_is_nan(plant: Plant) -> None:
    norm()
    stored = "tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask"
    plant(NORM, f"{stored})", f"{stored} & (offs_k > 0)[None, :])")
    with pytest.raises(AssertionError, match="worst element 0: nan"):
        norm()


def test_an_address_whose_tensor_is_gone() -> None:
    def rows() -> None:
        operators.sinkhorn_rows([like], table, torch.zeros(33, device="cuda"), 0.1)

    operators, logits = torch.ops.elastic_kernels, draw(5, 33).float().cuda()
    table, like = operators.sinkhorn_table([logits]), logits.clone()
    rows()
    del logits
    with pytest.raises(KernelFault, match="reads"):
        rows()


def test_a_run_must_launch_every_kernel_and_check_it() -> None:
    kernels = entry_kernels()
    assert {"_layer_norm_fwd_kernel", "_adamw_kernel", "_row_pass_kernel"} <= kernels
    assert all(name.endswith("_kernel") for name in kernels)
    assert complaints(kernels, unchecked=0) == []
    assert complaints(kernels - {"_adamw_kernel"}, 0) == ["no test launches _adamw_kernel"]
    assert "3 launches are too large" in complaints(kernels, unchecked=3)[0]
