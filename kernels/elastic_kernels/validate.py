"""Checks of user input shared by the public operators."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import torch
from torch import Tensor

from elastic_kernels import dispatch


def prefix(op: str, name: str, value: int, largest: int) -> None:
    """Raise ValueError unless `1 <= value <= largest`."""
    if isinstance(value, (float, str)) or not 1 <= value <= largest:
        raise ValueError(f"{op}: expected {name} in 1..{largest}, got {value}")


def sizes(module: object, **sizes: int | None) -> None:
    """Raise ValueError unless the sizes of a new module are integers of at least 1, or are not given."""
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, Integral) or size < 1):
            raise ValueError(
                f"{type(module).__name__}: expected {name}, an integer of at least 1, got {size!r}"
            )


def matrix(op: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a matrix of packed tokens."""
    if x.dim() != 2:
        raise ValueError(f"{op}: expected x [tokens, width], packed as x.flatten(0, 1), got {list(x.shape)}")


def one_of(op: str, name: str, value: str, names: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the names."""
    if value not in names:
        raise ValueError(f"{op}: expected {name} one of {', '.join(map(repr, names))}, got {value!r}")


def share(op: str, name: str, value: int | None, weight: Tensor, groups: int, width: int) -> int:
    """Rows in use of each of the stacked matrices of a weight: given, or the share that `width` has of its.

    Raises ValueError if there are not so many, or the share is no whole number.
    """
    most, largest = weight.shape[0] // groups, weight.shape[1]
    if value is None:
        value = most * width // largest  # not `divmod`, which torch.compile lacks for symbolic widths
        if value * largest != most * width:
            raise ValueError(f"{op}: expected {name}, or a width that is a share of {largest}, got {width}")
    prefix(op, name, value, most)
    return value


def heads(op: str, value: int | None, weight: Tensor, head_dim: int, width: int) -> int:
    """Heads in use of a weight `[3 * heads_max * head_dim, w_max]`: given, or the share that `width` has."""
    most, largest = weight.shape[0] // 3, weight.shape[1]
    if weight.shape[0] % (3 * head_dim):
        shape = tuple(weight.shape)
        raise ValueError(f"{op}: expected qkv_weight [3 * heads * {head_dim}, C], got {shape}")
    if value is None:
        value = most * width // (largest * head_dim)
        if value * largest * head_dim != most * width:
            raise ValueError(
                f"{op}: expected heads, or a width whose part of {most} channels is a multiple of head_dim "
                f"{head_dim}, got {width}"
            )
    prefix(op, "heads", value, most // head_dim)
    return value


def operands(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all given tensors share one device and one floating dtype (autocast may mix dtypes)."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{op}: expected a floating-point {name}, got {t.dtype}")
    if len({t.device for t in given.values()}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in given.items())
        raise ValueError(f"{op}: expected one device, got {got}")
    if dispatch.autocast_dtype(next(iter(given.values())).device) is not None:
        return
    if len({t.dtype for t in given.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"{op}: expected one dtype, got {got}")


def vectors(op: str, x: Tensor, **expected: tuple[Tensor | None, int]) -> None:
    """Raise ValueError unless given tensors are vectors of the expected lengths, on the device of `x`.

    A kernel would read beyond a shorter one, and other entries of one with another stride than 1.
    """
    for name, (tensor, length) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{op}: expected {name} [{length}], got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")
        if tensor.stride(0) != 1 and length > 1:
            raise ValueError(
                f"{op}: expected {name} of stride 1, as contiguous() gives, got {tensor.stride(0)}"
            )


def chosen_rows(op: str, x: Tensor, rows: Tensor | None) -> None:
    """Raise ValueError unless `rows` are indices of rows of a matrix `x`, or None."""
    if rows is None:
        return
    if x.dim() != 2 or rows.dtype != torch.int64 or rows.dim() != 1:
        got = f"{rows.dtype} {list(rows.shape)} and x {list(x.shape)}"
        raise ValueError(f"{op}: expected rows int64 [kept] of x [tokens, width], got {got}")
    vectors(op, x, rows=(rows, rows.shape[0]))


def branch_rows(op: str, x: Tensor, residual: Tensor, rows: Tensor | None, row_scale: Tensor | None) -> None:
    """Raise ValueError unless matrix `x` has a row (and a factor) for each of `rows`, or of `residual`."""
    if x.dim() != 2 or residual.dim() != 2:
        raise ValueError(f"{op}: expected matrices, got x {tuple(x.shape)}, residual {tuple(residual.shape)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"{op}: expected rows int64 [kept], got {rows.dtype} {tuple(rows.shape)}")
    kept = residual.shape[0] if rows is None else rows.shape[0]
    if x.shape[0] != kept:
        raise ValueError(f"{op}: expected {kept} rows of x, got {x.shape[0]}")
    vectors(op, x, rows=(rows, kept), row_scale=(row_scale, kept))
    if residual.device != x.device:
        raise ValueError(f"{op}: expected residual on {x.device}, got {residual.device}")


def mlp(
    op: str,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None = None,
) -> None:
    """Raise ValueError unless the layers of an MLP fit each other, and their vectors them."""
    hidden, width = fc1_weight.shape
    if tuple(fc2_weight.shape) != (width, hidden):
        raise ValueError(f"{op}: expected fc2_weight {(width, hidden)}, got {tuple(fc2_weight.shape)}")
    vectors(op, x, fc1_bias=(fc1_bias, hidden), fc2_bias=(fc2_bias, width), gamma=(gamma, width))
