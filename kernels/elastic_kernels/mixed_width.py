"""Many widths in one launch: every row of a batch passes through the subnet of its own width.

    y[r, :n_r] = s_r * x[r, :w_r] W[:n_r, :w_r]^T + b[:n_r],   0 beyond          w_r, n_r: of row r

For serving requests of different budgets together, and for training several subnets on one batch: gradients
of all add up in the full weight. Rows are as wide as the largest network; what lies beyond the width of a row
is not read, and is 0 in results. Widths are tensors on the device: nothing waits for them. Any order of rows
is right; where rows of one width lie together, no tile of the Triton kernel (`triton_ops/mixed_width.py`)
computes more than its rows need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.attention import Groups, packed_attention
from elastic_kernels.blocks import ElasticBlock
from elastic_kernels.linear import Scale, factor, linear_backend


def mixed_width_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor,
    out_widths: Tensor,
    *,
    scale: Scale = "offset",
) -> Tensor:
    """Multiply every row by the corner of a shared weight that belongs to its widths.

    Args:
        x: `[rows, in_max]`; of row `r` only the first `widths[r]` entries are read.
        weight: `[out_max, in_max]`.
        bias: `[out_max]` or None; not scaled.
        widths: int64 `[rows]`, from 1 to `in_max`, on the device of `x`.
        out_widths: int64 `[rows]`, from 1 to `out_max`.
        scale: of each row, as in `elastic_linear`: "offset" is `in_max / widths[r]`.

    Returns:
        `[rows, out_max]`, the dtype of the matrix product; row `r` is 0 from `out_widths[r]` on.

    Raises:
        ValueError: mismatched shapes or devices. Values of widths are not checked, which would wait for the
            device; larger ones count as the largest.
        TypeError: tensors of different dtypes outside autocast.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: as of `elastic_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import mixed_width_linear
        >>> W, widths = torch.ones(4, 4), torch.tensor([2, 4])
        >>> mixed_width_linear(torch.ones(2, 4), W, None, widths, widths)
        tensor([[4., 4., 0., 0.],
                [4., 4., 4., 4.]])
    """
    op = "mixed_width_linear"
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x [rows, {weight.shape[1]}], got {list(x.shape)}")
    validate.operands(op, x=x, weight=weight, bias=bias)
    validate.vectors(op, x, bias=(bias, weight.shape[0]))
    _check_widths(op, x, widths=widths, out_widths=out_widths)
    factors = row_factors(scale, weight.shape[1], widths)
    if linear_backend(op, x).backend == "triton":
        from elastic_kernels.triton_ops.mixed_width import MixedWidthFunction

        dtype = dispatch.product_dtype(x)
        return MixedWidthFunction.apply(x, weight, bias, widths, out_widths, factors, dtype)
    y = F.linear(x.masked_fill(beyond(widths, x.shape[1]), 0), weight)
    if factors is not None:
        y = y * factors.to(y.dtype).unsqueeze(1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.masked_fill(beyond(out_widths, y.shape[1]), 0)


def mixed_width_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, widths: Tensor) -> Tensor:
    """Normalise every row over its own width.

    Args:
        x: `[rows, w_max]`.
        weight, bias: `[w_max]`.
        eps: added to the variance.
        widths: as in `mixed_width_linear`.

    Returns:
        The shape of `x`, the wider dtype of `x` and `weight`; row `r` is 0 from `widths[r]` on.

    Raises:
        ValueError, TypeError: as `mixed_width_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import mixed_width_layer_norm
        >>> x, one, zero = torch.tensor([[1.0, 3.0, 9.0]]), torch.ones(3), torch.zeros(3)
        >>> mixed_width_layer_norm(x, one, zero, 0.0, torch.tensor([2]))
        tensor([[-1.,  1.,  0.]])
    """
    op = "mixed_width_layer_norm"
    validate.operands(op, x=x, weight=weight, bias=bias)
    validate.vectors(op, x, weight=(weight, x.shape[1]), bias=(bias, x.shape[1]))
    _check_widths(op, x, widths=widths)
    outside, count = beyond(widths, x.shape[1]), widths.clamp(max=x.shape[1]).unsqueeze(1)
    wide = x.to(torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32))
    wide = wide.masked_fill(outside, 0)
    centred = (wide - wide.sum(1, keepdim=True) / count).masked_fill(outside, 0)
    normed = centred * (centred.square().sum(1, keepdim=True) / count + eps).rsqrt()
    return (normed * weight + bias).masked_fill(outside, 0).to(torch.promote_types(x.dtype, weight.dtype))


def mixed_width_block(block: ElasticBlock, x: Tensor, groups: Groups, widths: Tensor) -> Tensor:
    """Pass every row through a block at its own width, with the heads and hidden units that go with it.

    Args:
        block: of the largest network.
        x: `[tokens, w_max]`, packed tokens; those of one sequence are equally wide.
        groups: as of `packed_attention`.
        widths: int64 `[tokens]`, as in `mixed_width_linear`; their shares of the heads are whole numbers.

    Returns:
        `[tokens, w_max]`, the dtype of `x`; beyond its width a row is 0.

    Raises:
        ValueError, TypeError, RuntimeError: as the operators it is made of.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticBlock, mixed_width_block
        >>> widths = torch.tensor([16] * 5 + [32] * 5)  # two sequences of 5 tokens
        >>> mixed_width_block(ElasticBlock(32, 64, 16), torch.randn(10, 32), [(2, 5)], widths).shape
        torch.Size([10, 32])
    """
    attn, mlp, largest = block.attn, block.mlp, x.shape[1]
    inner, hidden = attn.qkv.out_features // 3, mlp.fc1.out_features
    heads = widths * inner // largest
    units = (widths.double() / largest * hidden).long()  # as `elastic_hidden_features`
    x = x.masked_fill(beyond(widths, largest), 0)

    h = mixed_width_layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps, widths)
    parts = attn.qkv.weight.chunk(3), (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    qkv = [mixed_width_linear(h, w, b, widths, heads, scale=attn.scale) for w, b in zip(*parts, strict=True)]
    # Values of heads that a row does not have are 0, so their outputs are.
    h = packed_attention(torch.stack(qkv, 1).unflatten(-1, (-1, attn.head_dim)), groups)
    h = mixed_width_linear(h, attn.proj.weight, attn.proj.bias, heads, widths, scale=attn.scale)
    x = x + (h if block.ls1 is None else h * block.ls1.gamma).to(x.dtype)

    h = mixed_width_layer_norm(x, block.norm2.weight, block.norm2.bias, block.norm2.eps, widths)
    h = F.gelu(mixed_width_linear(h, mlp.fc1.weight, mlp.fc1.bias, widths, units, scale=mlp.scale))
    h = mixed_width_linear(h, mlp.fc2.weight, mlp.fc2.bias, units, widths, scale=mlp.scale)
    return x + (h if block.ls2 is None else h * block.ls2.gamma).to(x.dtype)


def row_factors(scale: Scale, largest: int, widths: Tensor) -> Tensor | None:
    """float32 `[rows]`: the value of a scale in each row; None means 1 in all."""
    if scale == "offset":
        return (largest / widths.double()).float()
    number = factor(scale, largest, largest)
    return None if number == 1 else widths.new_full(widths.shape, number, dtype=torch.float32)


def beyond(widths: Tensor, largest: int) -> Tensor:
    """Boolean `[rows, largest]`: what lies beyond the width of a row."""
    return torch.arange(largest, device=widths.device) >= widths.unsqueeze(1)


def _check_widths(op: str, x: Tensor, **widths: Tensor) -> None:
    for name, tensor in widths.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{op}: expected {name} int64 [{x.shape[0]}], got {tensor.dtype}")
    validate.vectors(op, x, **{name: (tensor, x.shape[0]) for name, tensor in widths.items()})
