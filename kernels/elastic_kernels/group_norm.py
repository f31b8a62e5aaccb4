"""Elastic group norm of channels-last maps, with the residual addition and ReLU of a ResNet's bottleneck.

    y = act((x - mean) / sqrt(var + eps) * weight[:C] + bias[:C] + residual)          C = x.shape[-1]

Mean and variance are those of a sample's group: `C / groups` channels, so a group of a narrower network has
fewer.

The Triton kernels are in `triton_ops/group_norm.py`.

Source: Wu and He, 2018; POA (Zhang et al., ECCV 2024); official `DynamicGroupNorm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate

MAX_PER_GROUP = 512  # channels, of the Triton kernels


def elastic_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalise groups of channels, with the first entries of a shared affine.

    Args:
        x: `[N, ..., C]`, floating point, channels last.
        weight, bias: `[C_max]`; only the first `C` entries are read.
        groups: how many the channels are split into; divides `C`.
        eps: added to the variance.
        residual: added before the activation; shape and dtype of `x`, or None.
        activation: None or "relu".

    Returns:
        The shape and dtype of `x`.

    Raises:
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.
        ValueError: `C` is wider than the affine parameters or no multiple of `groups`, a residual of another
            shape or dtype, or an unknown activation.

    Numerics: fp32 for half-precision inputs, whatever autocast says; rounded once. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_group_norm
        >>> x, weight, bias = torch.randn(2, 4, 4, 6), torch.ones(8), torch.zeros(8)
        >>> elastic_group_norm(x, weight, bias, 2, 1e-5, activation="relu").shape
        torch.Size([2, 4, 4, 6])
    """
    op, channels = "elastic_group_norm", x.shape[-1]
    validate.prefix(op, "channels", channels, weight.shape[0])
    validate.vectors(op, x, weight=(weight, weight.shape[0]), bias=(bias, weight.shape[0]))
    if x.dim() < 3 or channels % groups:
        raise ValueError(f"{op}: expected x [N, ..., C], C a multiple of {groups}, got {tuple(x.shape)}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"{op}: expected residual {tuple(x.shape)} {x.dtype}, got {got}")
    if activation not in (None, "relu"):
        raise ValueError(f"{op}: expected activation None or 'relu', got {activation!r}")
    if group_norm_backend(x, groups).backend == "triton":
        from elastic_kernels.triton_ops.group_norm import GroupNormFunction

        flat = (x.flatten(1, -2), None if residual is None else residual.flatten(1, -2))
        options = (groups, eps, activation == "relu", torch.is_grad_enabled())
        y = GroupNormFunction.apply(flat[0], weight, bias, flat[1], *options)
        return y.view(x.shape)
    return _reference(x, weight[:channels], bias[:channels], groups, eps, residual, activation)


def group_norm_backend(x: Tensor, groups: int) -> dispatch.Choice:
    """The backend that `elastic_group_norm` takes for such an input, and why."""
    size, limit = x.shape[-1] // groups, None
    if size > MAX_PER_GROUP:
        limit = f"the kernel takes up to {MAX_PER_GROUP} channels a group, got {size}"
    return dispatch.choose("elastic_group_norm", x, limit)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    exact = x if x.dtype == torch.float64 else x.float()
    weight, bias = weight.to(exact.dtype), bias.to(exact.dtype)
    # Of channels-last maps PyTorch sums squares, which cancel where means are large.
    y = F.group_norm(exact.movedim(-1, 1).contiguous(), groups, weight, bias, eps).movedim(1, -1)
    if residual is not None:
        y = y + residual
    return (F.relu(y) if activation == "relu" else y).to(x.dtype)
