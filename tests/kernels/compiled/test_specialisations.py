"""How many binaries the Triton kernels need for all subnets: few, or every new shape would compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from elastic_kernels.triton_ops import attention, layer_norm

WIDTHS = range(384, 1025, 64)
TOKENS = [
    37,
    197,
    1,
    2,
    3,
    16,
    31,
    64,
    100,
    256,
    1000,
    1024,
    4097,
    8192,
    10007,
    25216,
    35227,
    40000,
    65536,
    99991,
]
LENGTHS = (37, 197)
DTYPE = torch.bfloat16


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


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())


def binaries(kernel: Any) -> int:
    return len(kernel.device_caches[0][0])


def test_layer_norm_needs_a_binary_per_block_size() -> None:
    forward, backward = layer_norm._layer_norm_fwd_kernel, layer_norm._layer_norm_bwd_kernel
    fp32 = torch.float32
    for width in WIDTHS:
        config = layer_norm.row_config(width)
        settings = {
            "HAS_AFFINE": True, "HAS_INDEX": True, "ROWS": config.rows, "BLOCK": config.block,
            "num_warps": config.warps, "grid": (1,),
        }  # fmt: skip
        for tokens in TOKENS:
            pointers = (DTYPE, fp32, fp32, torch.int64, DTYPE, fp32, fp32)
            forward.warmup(*pointers, tokens, width, width, 1e-6, **settings)
            pointers = (DTYPE, DTYPE, fp32, torch.int64, fp32, fp32, DTYPE, fp32)
            backward.warmup(*pointers, tokens, width, width, **settings)
    blocks = {layer_norm.row_config(width).block for width in WIDTHS}
    assert binaries(forward) == binaries(backward) == len(blocks) == 2


def test_attention_needs_a_binary_per_length_class() -> None:
    forward, backward = attention._resident_fwd_kernel, attention._bwd_kernel
    fp32 = torch.float32
    for width in WIDTHS:
        sizes = (width // 64, 3 * width, width, 64)
        for tokens in TOKENS:
            for length in LENGTHS:
                config = attention.fwd_config(length, 64, DTYPE.itemsize, small_part=False)
                forward.warmup(DTYPE, DTYPE, fp32, tokens, length, *sizes, 0.18, **launch(config))
                config = attention.bwd_config(64, DTYPE.itemsize, small_part=False)
                backward.warmup(
                    DTYPE, DTYPE, DTYPE, fp32, DTYPE, tokens, length, *sizes, 0.125, 0.18, **launch(config)
                )
    assert binaries(forward) == len(LENGTHS)
    assert binaries(backward) == 1


def launch(config: attention.AttentionConfig) -> dict[str, Any]:
    return {
        "HEAD_DIM": 64, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": "ieee",
        "num_warps": config.warps, "num_stages": config.stages, "grid": (1,),
    }  # fmt: skip
