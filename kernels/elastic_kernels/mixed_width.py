"""Many widths in one launch: every row of a batch passes through the subnet of its own width.

    y[r, :n_r] = act(s_r * x[r, :w_r] W[:n_r, :w_r]^T + b[:n_r]),   0 beyond          w_r, n_r: of row r

For serving requests of different budgets together, and for training several subnets on one batch: gradients
of all add up in the full weight. Rows are as wide as the largest network; what lies beyond the width of a row
has no effect, be it NaN, and is 0 in results. Widths are tensors on the device: nothing waits for them. Any
order of rows is right; where rows of one width lie together, no tile of the Triton kernels
(`triton_ops/mixed_width.py`, `triton_ops/layer_norm.py`) computes more than its rows need. Whole modules:
`mixed_width_blocks.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import dispatch, validate
from elastic_kernels.layer_norm import layer_norm_backend
from elastic_kernels.linear import ACTIVATIONS, Scale, factor, linear_backend


def mixed_width_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor,
    out_widths: Tensor,
    *,
    scale: Scale = "offset",
    activation: str | None = None,
) -> Tensor:
    """Multiply every row by the corner of a shared weight that belongs to its widths.

    Args:
        x: `[rows, in_max]`; of row `r` only the first `widths[r]` entries count.
        weight: `[out_max, in_max]`.
        bias: `[out_max]` or None; not scaled.
        widths: int64 `[rows]`, from 1 to `in_max`, on the device of `x`.
        out_widths: int64 `[rows]`, from 1 to `out_max`.
        scale: of each row, as in `elastic_linear`: "offset" is `in_max / widths[r]`.
        activation: as in `elastic_linear`.

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
    if activation is not None:
        validate.one_of(op, "activation", activation, ACTIVATIONS)
    y = mixed_width_stacked(op, x, weight, bias, widths, out_widths, 1, scale=scale, activation=activation)
    return y.flatten(1)


def mixed_width_stacked(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor,
    out_widths: Tensor,
    groups: int,
    *,
    scale: Scale,
    activation: str | None = None,
) -> Tensor:
    """`[rows, in_max]` -> `[rows, groups, out_max]`, by each of the matrices stacked in a weight."""
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x [rows, {weight.shape[1]}], got {list(x.shape)}")
    validate.operands(op, x=x, weight=weight, bias=bias)
    validate.vectors(op, x, bias=(bias, weight.shape[0]))
    check_widths(op, x, widths=widths, out_widths=out_widths)
    factors = row_factors(scale, weight.shape[1], widths, torch.promote_types(x.dtype, torch.float32))
    if linear_backend(op, x).backend == "triton":
        from elastic_kernels.triton_ops.mixed_width import MixedWidthFunction

        options = (groups, dispatch.product_dtype(x), activation or "", torch.is_grad_enabled())
        return MixedWidthFunction.apply(x, weight, bias, widths, out_widths, factors, *options)
    y = F.linear(x.masked_fill(beyond(widths, x.shape[1]), 0), weight)
    if factors is not None:
        y = (y * factors.unsqueeze(1)).to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.unflatten(1, (groups, -1))
    y = y.masked_fill(beyond(out_widths, y.shape[2]).unsqueeze(1), 0)
    return y if activation is None else ACTIVATIONS[activation](y)


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
        ValueError, TypeError, RuntimeError: as `mixed_width_linear`.

    Example:
        >>> import torch
        >>> from elastic_kernels import mixed_width_layer_norm
        >>> x, one, zero = torch.tensor([[1.0, 3.0, 9.0]]), torch.ones(3), torch.zeros(3)
        >>> mixed_width_layer_norm(x, one, zero, 0.0, torch.tensor([2]))
        tensor([[-1.,  1.,  0.]])
    """
    return _row_norm("mixed_width_layer_norm", x, weight, bias, eps, widths)


def mixed_width_rms_norm(x: Tensor, weight: Tensor, eps: float, widths: Tensor) -> Tensor:
    """Divide every row by the root mean square of its own width.

    Args:
        x, weight, eps, widths: as of `mixed_width_layer_norm`.

    Returns, Raises: as `mixed_width_layer_norm`.

    Example:
        >>> import torch
        >>> from elastic_kernels import mixed_width_rms_norm
        >>> mixed_width_rms_norm(torch.tensor([[3.0, 3.0, 9.0]]), torch.ones(3), 0.0, torch.tensor([2]))
        tensor([[1., 1., 0.]])
    """
    return _row_norm("mixed_width_rms_norm", x, weight, None, eps, widths)


def _row_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, widths: Tensor) -> Tensor:
    check_widths(op, x, widths=widths)
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"{op}: expected x [rows, {weight.shape[0]}], got {list(x.shape)}")
    validate.operands(op, x=x, weight=weight, bias=bias)
    validate.vectors(op, x, weight=(weight, x.shape[1]), bias=(bias, x.shape[1]))
    if layer_norm_backend(x, op).backend == "triton":
        from elastic_kernels.triton_ops.layer_norm import LayerNormFunction

        return LayerNormFunction.apply(x, weight, bias, eps, None, widths, torch.is_grad_enabled())
    outside, count = beyond(widths, x.shape[1]), widths.clamp(max=x.shape[1]).unsqueeze(1)
    wide = x.to(torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32))
    wide = wide.masked_fill(outside, 0)
    if bias is not None:
        wide = (wide - wide.sum(1, keepdim=True) / count).masked_fill(outside, 0)
    y = wide * (wide.square().sum(1, keepdim=True) / count + eps).rsqrt() * weight
    if bias is not None:
        y = y + bias
    return y.masked_fill(outside, 0).to(torch.promote_types(x.dtype, weight.dtype))


def row_factors(scale: Scale, largest: int, widths: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`[rows]` in a dtype: the value of a scale in each row; None means 1 in all."""
    if scale == "offset":
        return (largest / widths.clamp(max=largest).double()).to(dtype)
    number = factor(scale, largest, largest)
    return None if number == 1 else widths.new_full(widths.shape, number, dtype=dtype)


def beyond(widths: Tensor, largest: int) -> Tensor:
    """Boolean `[rows, largest]`: what lies beyond the width of a row."""
    return torch.arange(largest, device=widths.device) >= widths.unsqueeze(1)


def check_widths(op: str, x: Tensor, **widths: Tensor) -> None:
    """Raise ValueError unless there are integers for each row of a matrix `x`."""
    validate.matrix(op, x)
    for name, tensor in widths.items():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        if kind != torch.int64:
            raise ValueError(f"{op}: expected {name} int64 [{x.shape[0]}], got {kind}")
    validate.vectors(op, x, **{name: (tensor.contiguous(), x.shape[0]) for name, tensor in widths.items()})
