"""Other implementations of norms and of a SwiGLU's gate: Liger's and QuACK's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Provider
from benchmarks.peers.layer_norm import imported
from elastic_kernels import Rotary


def liger_rms_norm(eps: float, device: torch.device) -> Provider:
    function = imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", device)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return function.apply(x, weight[: x.shape[-1]].contiguous(), eps, 0.0, "llama", False)

    return norm


def quack(eps: float, device: torch.device) -> Provider:
    function = imported("quack", "rmsnorm", device)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight[: x.shape[-1]].contiguous(), eps=eps)

    return norm


def liger_gate(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """`silu(g) * u`."""
    function = imported("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", device)
    return function.apply


def liger_qk_norm(eps: float, rotary: Rotary, device: torch.device) -> Provider:
    """Liger's RMSNorm of each, and its rotary embedding of both, which is in place."""
    norm = liger_rms_norm(eps, device)
    function = imported("liger_kernel.ops.rope", "LigerRopeFunction", device)
    sin, cos = rotary.sin.unsqueeze(0), rotary.cos.unsqueeze(0)

    def normed(qkv: Tensor, weight: Tensor) -> Tensor:
        q, k = (norm(qkv[:, part], weight[part]).transpose(0, 1).unsqueeze(0) for part in range(2))
        turned = function.apply(q, k, cos, sin)
        return torch.stack([*(t[0].transpose(0, 1) for t in turned), qkv[:, 2]], 1)

    return normed


def liger_group_norm(groups: int, eps: float, device: torch.device) -> Provider:
    """Of maps with channels first, so that channels-last ones are copied; addition and ReLU are passes."""
    function = imported("liger_kernel.ops.group_norm", "LigerGroupNormFunction", device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        channels = x.shape[-1]
        affine = weight[:channels].contiguous(), bias[:channels].contiguous()
        y = function.apply(x.movedim(-1, 1).contiguous(), *affine, channels, groups, eps)
        return F.relu(y.movedim(1, -1) + residual)

    return norm
