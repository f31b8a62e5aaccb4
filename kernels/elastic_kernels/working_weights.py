"""Weights in the dtype of the products, kept beside fp32 masters instead of rounded for every product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Copy:
    """A rounded weight, and the version of the master it was last rounded from here."""

    tensor: Tensor
    version: int


_copies = WeakTensorKeyDictionary()


@torch.no_grad()
def working_weights(weights: Iterable[Tensor], dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Keep copies of weights that the Triton products of that dtype read in place of the weights.

    A copy that its weight has left behind (loaded, stepped by another optimiser) is rounded again when it is
    next read, so operands are those without copies, to the bit. (A library may sum the product of a corner
    in another order than that of a compact matrix.) `FusedAdamW(copies=...)` writes them in its own pass.
    Under `torch.compile` they are not read.

    Args:
        weights: floating point, each with a copy as long as it lives.
        dtype: float16 or bfloat16.

    Returns:
        The copy of each weight.

    Raises:
        TypeError: another dtype.

    Example:
        >>> copies = working_weights([layer.weight for layer in layers], torch.bfloat16)
        >>> optimizer = FusedAdamW(model.parameters(), copies=copies)
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"working_weights: expected float16 or bfloat16, got {dtype}")
    found = {}
    for weight in weights:
        found[weight] = weight.detach().to(dtype, memory_format=torch.contiguous_format)
        _copies[weight] = _Copy(found[weight], weight._version)
    return found


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's copy in a dtype, up to date, if it has one; else the weight itself."""
    copy = None if torch.compiler.is_compiling() else _copies.get(weight)
    if copy is None or copy.tensor.dtype != dtype:
        return weight
    # `FusedAdamW` writes weights and copies alike, which no version tells.
    if copy.version != weight._version:
        copy.tensor.copy_(weight.detach())
        copy.version = weight._version
    return copy.tensor
