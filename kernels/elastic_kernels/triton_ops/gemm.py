"""What kernels with matrix products share: the product, tiles, launch settings, who runs plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from elastic_kernels.triton_ops.device import capability, cdiv, is_interpreted
from elastic_kernels.tuning import Tunable, power_of_2, tiles


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc`, or without acc if None; "upcast": for the interpreter, whose bf16 products are wrong."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program to tile: columns of GROUP_M tiles, so that neighbours share operands in L2."""
    per_band = GROUP_M * tiles_n
    first = (pid // per_band) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % per_band) % height, (pid % per_band) // height


@triton.jit
def _halves_of(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def slices_of(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile in slices of so many columns, at least two: an epilogue of each needs fewer registers."""
    left, right = _halves_of(acc, BLOCK_M, BLOCK_N)
    slices = left, right
    if BLOCK_N > 2 * COLUMNS:
        slices = slices_of(left, BLOCK_M, BLOCK_N // 2, COLUMNS) + slices_of(
            right, BLOCK_M, BLOCK_N // 2, COLUMNS
        )
    return slices


@dataclass(frozen=True)
class GemmConfig:
    """Launch settings of a product: a tile of `block_m` x `block_n`, reduced in steps of `block_k`.

    A tile may have columns `beside` it, in an accumulator of their own, as sizes are powers of two;
    then two blocks share a processor. Or programs are `persistent`: so many for each processor, which make
    tile after tile and load them by tensor descriptors. Or the kernel is another package's, the `provider`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    beside: int = 0
    persistent: int = 0
    provider: str = "triton"

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.block_n + self.beside


# `residual_plain` is a sum of whole rows, neither chosen nor scaled.
Form = Literal["linear", "gelu", "residual", "residual_plain", "dgrad", "dgrad_gelu", "dgrad_act"]

# Not timed on a GPU yet. Of the settings that compile without spilling, those with the largest tile: on sm_90
# 256 columns (one block a processor), elsewhere 128. Products with a GELU have two blocks there, of which one
# hides its epilogue behind the other's loop: tiles of 192 columns, as with 128 L2 would be the limit.
_FP32 = GemmConfig(64, 32, 32, warps=4, stages=1)  # exact products run on the plain units, from registers
_HALF = GemmConfig(128, 128, 64, warps=8, stages=3)  # 96 KB of shared memory, the least an architecture has
_HALF_WIDE = GemmConfig(128, 256, 64, warps=8, stages=4)
_HALF_GELU = GemmConfig(128, 128, 32, warps=8, stages=4, beside=64)
WIDE_WASTE = 1.15  # a wide tile is taken while at most this much is computed in vain
TWO_BLOCKS = 128  # registers of a thread, of blocks of 8 warps of which two share a processor


@lru_cache
def gemm_config(form: Form, columns: int, itemsize: int, capability: tuple[int, int]) -> GemmConfig:
    """Settings for a result of so many columns, on a GPU of a compute capability."""
    wide = {"gelu": _HALF_GELU, "dgrad_gelu": _HALF_GELU, "dgrad_act": _HALF}.get(form, _HALF_WIDE)
    fits = cdiv(columns, wide.columns) * wide.columns <= WIDE_WASTE * columns
    return wide if itemsize == 2 and capability == (9, 0) and fits else narrow_config(itemsize)


def narrow_config(itemsize: int) -> GemmConfig:
    """Settings for any result on any GPU."""
    return _FP32 if itemsize == 4 else _HALF


# What runs a product of one matrix without a fusion, and why. Not timed on a GPU yet: the cost model puts
# cuBLAS at 700 TFLOP/s on an H200, and asks 97 % of that of a kernel that fuses nothing. The three corners of
# q, k and v are not one matrix in memory: baddbmm would first copy the bias over its result, and write dx
# three times.
PROVIDERS: dict[str, Literal["cublas", "triton"]] = {
    "linear": "cublas",  # the bias is cuBLASLt's epilogue and the offset scale its alpha
    "dgrad": "cublas",  # a plain product
}


if TorchVersion(torch.__version__) < "2.13":  # whose meta kernel of this operator raises
    _META = torch.library.Library("aten", "IMPL")
    _META.impl("addmm.dtype_out", lambda *_, out, **__: out, "Meta", allow_override=True)


def product_into(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """Write or add `scale * a @ b` to `out`, of their dtype, or fp32 however narrow they are; by cuBLAS."""
    if a.dtype != out.dtype and is_interpreted(a):  # which PyTorch has on CUDA alone
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=int(add), alpha=scale, out=out, **wider)


def quack_residual(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: float
) -> None:
    """Write `residual + scale * x @ weight.T + bias` to `out`, which may be the residual; by QuACK."""
    from quack.gemm_interface import gemm_add

    # A residual in place is given as another tensor: it is added before the product is rounded, not after.
    bias = None if bias is None else bias.flatten()
    gemm_add(x, weight.t(), residual.view_as(residual), out, bias, alpha=scale, tuned=False)


def is_described(*operands: Tensor) -> bool:
    """Whether tensor descriptors can load matrices: rows begin at 16 bytes, the GPU loads whole tiles."""
    major, _ = capability(operands[0].device)
    return (major >= 9 or is_interpreted(operands[0])) and all(
        x.stride(1) == 1
        and x.stride(0) * x.itemsize % 16 == 0
        and (x.data_ptr() or x.storage_offset() * x.itemsize) % 16 == 0
        for x in operands
    )


def launch_options(config: GemmConfig) -> dict[str, int]:
    beside = {"BESIDE": config.beside, "maxnreg": TWO_BLOCKS} if config.beside else {}
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages, **beside,
    }  # fmt: skip


_CANDIDATES = (
    _HALF,
    _HALF_WIDE,
    _HALF_GELU,
    GemmConfig(128, 256, 64, warps=8, stages=3),
    GemmConfig(256, 128, 64, warps=8, stages=3),
    GemmConfig(128, 128, 64, warps=4, stages=4),
    GemmConfig(128, 64, 64, warps=4, stages=4),
    GemmConfig(64, 128, 64, warps=4, stages=4),
    GemmConfig(64, 256, 64, warps=4, stages=4),
)
# By `python -m benchmarks predict --persistent`, not timed: ViT-L on an H200 takes 5 % less where one program
# adds a residual to whole rows, as much to chosen rows, 10 to 50 % more through a GELU. Nothing hides the
# epilogue of one; two have small tiles, so that L2 is the limit.
PERSISTENT = (
    GemmConfig(128, 256, 64, warps=8, stages=4, persistent=1),
    GemmConfig(128, 128, 64, warps=8, stages=3, persistent=2),
)
QUACK = GemmConfig(0, 0, 0, warps=0, stages=0, provider="quack")  # with settings of its own


def _candidates(form: Form) -> Callable[..., Sequence[GemmConfig]]:
    plain = ("linear", "dgrad")  # cuBLAS's, or of several matrices
    every = (
        *_CANDIDATES,
        *(() if form in plain else PERSISTENT),
        *((QUACK,) if form == "residual_plain" else ()),
    )
    return lambda *shape: every


_TUNABLES = {form: Tunable(form, _candidates(form)) for form in get_args(Form)}


def config_for(form: Form, x: Tensor, columns: int, inner: int) -> GemmConfig:
    """Settings for the product of rows like those of `x`; `inner` is the other number of features."""
    fallback = gemm_config(form, columns, x.dtype.itemsize, capability(x.device))
    if x.dtype.itemsize == 4:  # the spills of TF32 are not those of exact products
        return fallback
    return _TUNABLES[form].choose(x, (power_of_2(x.shape[0]), tiles(columns), tiles(inner)), fallback)
