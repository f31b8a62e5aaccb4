"""What the launchers ask about a tensor and the device it lies on."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from elastic_kernels.dispatch import Gpu, absent

SMALL_PARTS = ((8, 6), (8, 9), (12, 0), (12, 1))  # capabilities with 99 KB of shared memory a block
INTERPRETED_PROCESSORS = 4  # stand for a device's under the interpreter


@lru_cache
def _present(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu((0, 0), INTERPRETED_PROCESSORS)
    return Gpu(
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_properties(device).multi_processor_count,
    )


def _gpu(device: torch.device) -> Gpu:
    """The device, or for meta tensors the absent GPU that they are taken for."""
    return (absent() if device.type == "meta" else None) or _present(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) under the interpreter."""
    return _gpu(device).capability


def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return _gpu(device).processors


def is_interpreted(x: Tensor) -> bool:
    """Whether kernels run on the CPU, by the interpreter."""
    return x.device.type == "cpu"


def precision(x: Tensor) -> str:
    """Of products, for `gemm.dot`: TF32 only where PyTorch allows it; has no meaning in half precision."""
    if is_interpreted(x):
        return "upcast" if x.dtype == torch.bfloat16 else "ieee"
    if x.dtype != torch.float32:
        return "ieee"
    # Also says what `allow_tf32` allows, which cannot be read once `fp32_precision` was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(a: int, b: int) -> int:
    """Rounded up; Triton's own takes microseconds on the host, as does that of the next."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, which is positive."""
    return 1 << (n - 1).bit_length()


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous: the kernels read whole lines of it."""
    return x if x.stride(-1) == 1 else x.contiguous()
