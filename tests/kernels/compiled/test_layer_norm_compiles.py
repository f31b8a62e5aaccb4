"""The Triton LayerNorm compiled without a GPU, for every kind of part and every committed setting."""

from __future__ import annotations

import pytest
from aot import compile_kernel

from elastic_kernels.triton_ops import layer_norm as kernels
from elastic_kernels.triton_ops.layer_norm import RowConfig

ARCHITECTURES = (80, 89, 90, 100, 120)
CASES = [  # rare widths on one part
    (config, arch)
    for config in kernels.CONFIGS
    for arch in ARCHITECTURES
    if arch == 90 or config.block in (512, 1024)
]


@pytest.mark.parametrize(("config", "arch"), CASES, ids=lambda value: str(getattr(value, "block", value)))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"])
def test_layer_norm_compiles(kernel: str, dtype: str, config: RowConfig, arch: int) -> None:
    statistics = dict.fromkeys(("mean_ptr", "rstd_ptr", "shares_ptr", "weight_ptr", "bias_ptr"), "fp32")
    result = compile_kernel(
        getattr(kernels, kernel),
        arch,
        pointers={**statistics, "index_ptr": "i64"},
        pointer_dtype=dtype,
        floats=("eps",),
        constants={"HAS_AFFINE": True, "HAS_INDEX": True, "ROWS": config.rows, "BLOCK": config.block},
        multiples_of_16=("width", "stride_x"),
        warps=config.warps,
        stages=3,
    )
    print(f"sm_{arch} {dtype} {kernel} {config}: {result.summary()}")
    assert result.spilled_bytes == 0
    assert result.shared_bytes <= 48 * 1024
    assert not result.tensor_core_instructions()
    assert result.wide_global_loads() > 0
    assert result.wide_global_stores() > 0
