"""Norms of queries and keys over the channels of each head, and a rotary embedding after them.

    n = x / sqrt(mean(x^2) + eps) * w,  or LayerNorm(x) * w + b,  or x          of q and of k
    y = n * cos + rotate(n) * sin

All heads share the weights, and all heads of a token its angles, so that prefixes of heads need no slice of
them. The Triton kernels, one pass each way, are in `triton_ops/qk_norm.py`. Source: Henry et al., 2020;
Dehghani et al., 2023 (ViT-22B); Su et al., 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch
from elastic_kernels.attention import WIDEST_HEAD
from elastic_kernels.rotary import Rotary


def qk_norm(
    qkv: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rotary: Rotary | None = None,
) -> Tensor:
    """Normalise queries and keys, and turn them by the angles of their tokens.

    Args:
        qkv: `[tokens, 3, heads, head_dim]`, any strides.
        weight: `[2, head_dim]`, of queries and of keys; None means no norm.
        bias: `[2, head_dim]`; with one the norm is LayerNorm, without RMSNorm.
        eps: added to the variance, or to the mean square.
        rotary: angles of all tokens, which have no gradient in the Triton kernel; None means no embedding.

    Returns:
        The shape and dtype of `qkv`; values are unchanged.

    Raises:
        ValueError: shapes that do not fit `qkv`.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: the Triton kernel computes in fp32 and rounds once. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import Rotary, qk_norm
        >>> rotary = Rotary.of_grid(2, 2, head_dim=16, prefix=1, count=2)
        >>> qk_norm(torch.randn(10, 3, 4, 16), torch.ones(2, 16), rotary=rotary).shape
        torch.Size([10, 3, 4, 16])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qk_norm: expected qkv [tokens, 3, heads, head_dim], got {tuple(qkv.shape)}")
    for name, affine in (("weight", weight), ("bias", bias)):
        if affine is not None and tuple(affine.shape) != (2, qkv.shape[3]):
            raise ValueError(f"qk_norm: expected {name} [2, {qkv.shape[3]}], got {list(affine.shape)}")
        if affine is not None and affine.device != qkv.device:
            raise ValueError(f"qk_norm: expected {name} on {qkv.device}, got {affine.device}")
    if rotary is not None:
        rotary.check(qkv)
    if qk_norm_backend(qkv, rotary).backend == "triton":
        from elastic_kernels.triton_ops.qk_norm import QkNormFunction

        angles = (None, None) if rotary is None else (rotary.sin.contiguous(), rotary.cos.contiguous())
        halves = rotary is not None and rotary.halves
        return QkNormFunction.apply(qkv, weight, bias, *angles, eps, halves)
    if weight is not None:
        x, dim = qkv[:, :2].to(torch.promote_types(qkv.dtype, weight.dtype)), (qkv.shape[3],)
        normed = F.rms_norm(x, dim, None, eps) if bias is None else F.layer_norm(x, dim, None, None, eps)
        normed = normed * weight.unsqueeze(1)
        if bias is not None:
            normed = normed + bias.unsqueeze(1)
        qkv = torch.cat([normed.to(qkv.dtype), qkv[:, 2:]], 1)
    return qkv if rotary is None else rotary.turn(qkv)


def qk_norm_backend(qkv: Tensor, rotary: Rotary | None = None) -> dispatch.Choice:
    """The backend that `qk_norm` takes for such an input, and why."""
    dim, limit = qkv.shape[3], None
    if dim > WIDEST_HEAD or dim % 2:
        limit = f"the kernel takes an even head_dim up to {WIDEST_HEAD}, got {dim}"
    elif rotary is not None and (rotary.sin.requires_grad or rotary.cos.requires_grad):
        limit = "the kernel has no gradient of the angles"
    return dispatch.choose("qk_norm", qkv, limit)
