"""The Triton attention compiled without a GPU, for every kind of part and every committed setting."""

from __future__ import annotations

import pytest
from aot import Compiled, compile_kernel

from elastic_kernels.triton_ops import attention as kernels
from elastic_kernels.triton_ops.attention import AttentionConfig, bwd_config, fwd_config

SHARED_MEMORY_KB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may use, by architecture
LENGTHS = (37, 128, 197, 600)  # one of each length class


def cases() -> dict[str, tuple[int, str, int, str, AttentionConfig]]:
    """Every distinct (architecture, dtype, head_dim, kernel, settings); other head sizes on two parts."""
    found = {}
    for arch in SHARED_MEMORY_KB:
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            for dim in (16, 32, 64, 128):
                if (dim != 64 or dtype == "fp16") and (arch != 90 or (dtype == "fp16" and dim != 64)):
                    continue
                small = SHARED_MEMORY_KB[arch] < 128
                for length in LENGTHS:
                    config = fwd_config(length, dim, itemsize, small)
                    kernel = "_resident_fwd_kernel" if config.resident else "_streaming_fwd_kernel"
                    tile = f"{config.block_m}x{config.block_n}"
                    found[f"sm_{arch}-{dtype}-{dim}-{kernel}-{tile}"] = (arch, dtype, dim, kernel, config)
                config = bwd_config(dim, itemsize, small)
                found[f"sm_{arch}-{dtype}-{dim}-_bwd_kernel"] = (arch, dtype, dim, "_bwd_kernel", config)
    return found


def compiled(arch: int, dtype: str, dim: int, kernel: str, config: AttentionConfig) -> Compiled:
    return compile_kernel(
        getattr(kernels, kernel),
        arch,
        pointers={"lse_ptr": "fp32"},
        pointer_dtype=dtype,
        floats=("scale", "scale_log2"),
        constants={
            "HEAD_DIM": dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PRECISION": "ieee",
        },
        multiples_of_16=("stride_t", "stride_g", "stride_h"),
        warps=config.warps,
        stages=config.stages,
    )


@pytest.mark.parametrize("case", cases().values(), ids=cases().keys())
def test_attention_compiles(case: tuple[int, str, int, str, AttentionConfig]) -> None:
    arch, dtype, dim, kernel, config = case
    result = compiled(*case)
    print(f"sm_{arch} {dtype} d={dim} {kernel} {config}: {result.summary()}")
    assert result.spilled_bytes == 0
    assert result.shared_bytes <= SHARED_MEMORY_KB[arch] * 1024
    if dtype == "fp32":
        assert not result.tensor_core_instructions()
    elif arch == 90:
        assert "wgmma" in result.tensor_core_instructions()
    elif arch == 100 and config.block_m >= 64:
        assert "tcgen05.mma" in result.tensor_core_instructions()
    else:
        assert result.tensor_core_instructions()
