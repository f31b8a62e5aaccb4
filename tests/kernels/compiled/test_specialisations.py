"""How many binaries the Triton kernels need for all subnets: few, or every new shape would compile.

Blocks of all widths run forward and backward on meta tensors, through the launchers, on the H100 nobody has.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from elastic_kernels import ElasticBlock, KeptRows, backend, dispatch
from elastic_kernels.triton_ops import attention, gemm, layer_norm, linear, linear_wgrad, units

WIDTHS = range(384, 1025, 64)  # of the 143 subnets of ViT-L/16; depths share their blocks' binaries
IMAGES = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 31, 32, 48, 53, 64, 96, 127, 128)  # 20 token counts
MODULES = (attention, layer_norm, linear, linear_wgrad)


class NoGpu:
    """A driver that stands for an H100 nobody has."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the test's driver has no {name}")


KERNELS = {
    name: kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if isinstance(kernel, JITFunction) and name.endswith("_kernel")
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def specialise(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    monkeypatch.setattr(JITFunction, "__getitem__", specialise)
    # The number of binaries is asked, not the binaries.
    monkeypatch.setattr(triton.compiler, "compile", lambda *args, **kwargs: object())
    operators = {name: getattr(module, name) for module in MODULES for name in dir(module)}
    monkeypatch.setattr(units, "ops", SimpleNamespace(**operators))
    monkeypatch.setattr(dispatch, "_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(gemm, "capability", lambda device: (9, 0))
    for module in (layer_norm, linear_wgrad):
        monkeypatch.setattr(module, "processors", lambda device: 132)


def binaries() -> dict[str, int]:
    return {name: len(kernel.device_caches[0][0]) for name, kernel in KERNELS.items()}


def kept(groups: tuple[tuple[int, int], ...]) -> KeptRows:
    """Four fifths of each group."""
    groups = tuple((max(count * 4 // 5, 1), length) for count, length in groups)
    rows = torch.arange(sum(count * length for count, length in groups), device="meta")
    return KeptRows(groups, rows, rows.float())


def run_all_widths(block: ElasticBlock) -> None:
    for width in WIDTHS:
        for images in IMAGES:
            teacher, student = ((2 * images, 197),), ((2 * images, 197), (8 * images, 37))
            tokens = [sum(count * length for count, length in groups) for groups in (teacher, student)]
            with torch.no_grad():
                block(torch.empty(tokens[0], width, device="meta"), teacher)
            for choice in (None, (kept(student), kept(student))):
                x = torch.empty(tokens[1], width, device="meta", requires_grad=True)
                block(x, student, choice).sum().backward()


def test_all_subnets_need_few_binaries() -> None:
    with torch.device("meta"):
        block = ElasticBlock(1024, 4096, 64, layer_scale=1e-5)
    with backend("triton"):
        run_all_widths(block)  # fp32 weights, whose corners are rounded for every product
        for linear_layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear_layer.bfloat16()
        run_all_widths(block)  # bf16 weights, read in place
    counts = binaries()
    print(counts, sum(counts.values()))
    unused = {name for name, count in counts.items() if not count}
    assert unused == {"_attention_streaming_fwd_kernel"}
    assert sum(counts.values()) < 60
