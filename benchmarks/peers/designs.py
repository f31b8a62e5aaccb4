"""Other implementations of RMSNorm, of a SwiGLU's gate, and of products of several widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.failures import Unavailable
from benchmarks.harness import Provider
from benchmarks.peers.layer_norm import imported


def liger_rms_norm(eps: float, device: torch.device) -> Provider:
    function = imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", device)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return function.apply(x, weight[: x.shape[-1]].contiguous(), eps, 0.0, "llama", False)  # type: ignore[attr-defined]

    return norm


def quack(eps: float, device: torch.device) -> Provider:
    function = imported("quack", "rmsnorm", device)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight[: x.shape[-1]].contiguous(), eps=eps)  # type: ignore[operator]

    return norm


def liger_gate(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """`silu(g) * u`."""
    function = imported("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", device)
    return function.apply  # type: ignore[attr-defined]


def grouped_mm(parts: Sequence[tuple[int, int]], largest: int, device: torch.device) -> Provider:
    """`torch._grouped_mm`: one launch of products of equal shapes, so that corners are padded with zeros."""
    if device.type != "cuda":
        raise Unavailable("runs on CUDA only")
    ends = torch.tensor([count for count, _ in parts], device=device).cumsum(0, dtype=torch.int32)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        corners = [F.pad(weight[:w, :w], (0, largest - w, 0, largest - w)) for _, w in parts]
        return torch._grouped_mm(x, torch.stack(corners).mT, offs=ends)

    return product
