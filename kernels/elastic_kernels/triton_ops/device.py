"""What the launchers ask about a tensor and the device it lies on."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SMALL_PARTS = ((8, 6), (8, 9), (12, 0), (12, 1))  # capabilities with 99 KB of shared memory a block
INTERPRETED_PROCESSORS = 4  # stand for a device's under the interpreter


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_small_part(device: torch.device) -> bool:
    """Whether a block may use only 99 KB of shared memory there."""
    return capability(device) in SMALL_PARTS


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(x: Tensor) -> str:
    """Of products, for `gemm.dot`: TF32 only where PyTorch allows it; has no meaning in half precision."""
    if not x.is_cuda and x.dtype == torch.bfloat16:
        return "upcast"
    # Also says what `allow_tf32` allows, which cannot be read once `fp32_precision` was set.
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous: the kernels read whole lines of it."""
    return x if x.stride(-1) == 1 else x.contiguous()
