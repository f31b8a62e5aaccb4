"""Other implementations of LayerNorm with a prefix of an affine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.failures import Unavailable, require_cuda
from benchmarks.harness import Provider


def imported(package: str, name: str, device: torch.device) -> Any:
    """A name of a package, or `Unavailable` with the reason."""
    require_cuda(device)
    if importlib.util.find_spec(package.split(".")[0]) is None:
        raise Unavailable(f"{package.split('.')[0]} is not installed")
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{package}.{name} does not import: {error}") from None


def liger(eps: float, device: torch.device) -> Provider:
    function = imported("liger_kernel.ops.layer_norm", "LigerLayerNormFunction", device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = x.shape[-1]
        return function.apply(x, weight[:width].contiguous(), bias[:width].contiguous(), eps)

    return norm


def apex(eps: float, device: torch.device) -> Provider:
    """NVIDIA Apex (from source; the package of that name on the index is another)."""
    function = imported("apex.normalization.fused_layer_norm", "fused_layer_norm_affine", device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = x.shape[-1]
        return function(x, weight[:width].contiguous(), bias[:width].contiguous(), (width,), eps)

    return norm


def quack(eps: float, device: torch.device) -> Provider:
    """Two functions, for fp32 affines."""
    forward, backward = (imported("quack.rmsnorm", f"layernorm_{way}", device) for way in ("fwd", "bwd"))

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, rstd, mean = forward(x, weight, bias, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, rstd, mean = ctx.saved_tensors
            return backward(x, weight, dy.contiguous(), rstd, mean)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = x.shape[-1]
        return Norm.apply(x, weight[:width].float(), bias[:width].float())

    return norm


def peers(eps: float, device: torch.device) -> dict[str, Callable[[], Provider]]:
    """All of them, by name."""
    return {make.__name__: partial(make, eps, device) for make in (liger, apex, quack)}
