"""Launches on meta tensors are recorded as those of a GPU that nobody has."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch

from elastic_kernels import (
    ElasticBlock,
    absent_gpu,
    dispatch,
    elastic_layer_norm,
    elastic_linear_residual,
    mixed_width_block,
    planning,
)

triton = pytest.importorskip("triton")
compiled = pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter has no launches to record")


def meta(*shape: int, **options: object) -> torch.Tensor:
    return torch.empty(shape, device="meta", **options)


@compiled
def test_launches_are_recorded_and_nothing_remains() -> None:
    from triton.runtime.jit import JITFunction

    compiles, driver = JITFunction._do_compile, triton.runtime.driver._active
    x = meta(1001, 64, requires_grad=True)
    with absent_gpu("sm_90", processors=10) as launches:
        for _ in range(2):
            elastic_layer_norm(x, None, None, 1e-6).sum().backward()
    names = [launch.binary.name for launch in launches.made]
    assert names == ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"] * 2
    forward, backward = launches.binaries
    assert forward.constexprs["HAS_AFFINE"] is False and forward.constexprs["weight_ptr"] is None
    assert launches.made[0].programs == -(-1001 // forward.constexprs["ROWS"])
    assert launches.made[1].programs % 10 == 0  # a number of programs on each multiprocessor
    assert pickle.loads(pickle.dumps(backward)).kernel is backward.kernel
    assert (JITFunction._do_compile, triton.runtime.driver._active) == (compiles, driver)
    assert all(isinstance(device, int) for device in forward.kernel.device_caches)
    with planning(torch.float32):
        assert elastic_layer_norm(x, None, None, 1e-6).shape == x.shape
    assert len(launches.made) == 4


@compiled
def test_architectures_take_their_own_settings() -> None:
    x, weight, bias = meta(64, 256, dtype=torch.bfloat16), meta(1024, 256, dtype=torch.bfloat16), meta(1024)
    tiles = {}
    for architecture in ("sm_80", "sm_90"):
        with absent_gpu(architecture) as launches, planning(torch.bfloat16):
            elastic_linear_residual(x, weight, bias, meta(64, 1024))
        (binary,) = launches.binaries
        tiles[binary.architecture] = binary.constexprs["BLOCK_M"], binary.constexprs["BLOCK_N"]
    assert tiles.keys() == {80, 90} and len(set(tiles.values())) == 2


@compiled
def test_rows_of_any_widths_take_one_launch_of_each_layer() -> None:
    with torch.device("meta"):
        block = ElasticBlock(64, 128, 16)
        x, widths = torch.empty(30, 64, requires_grad=True), torch.empty(30, dtype=torch.int64)
        with absent_gpu() as launches, planning(torch.bfloat16):
            mixed_width_block(block, x, [(3, 10)], widths).sum().backward()
    names = Counter(launch.binary.name for launch in launches.made)
    assert names["_mixed_width_kernel"] == 2 * 4  # qkv, proj and both of the MLP, forward and backward
    assert names["_layer_norm_fwd_kernel"] == names["_layer_norm_bwd_kernel"] == 2
    assert names["_attention_resident_fwd_kernel"] == names["_attention_resident_bwd_kernel"] == 1


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of sm_80, .*, got 'sm_7'"):
        absent_gpu("sm_7")
