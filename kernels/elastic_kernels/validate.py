"""Checks of user input shared by the public operators."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix(op: str, name: str, value: int, largest: int) -> None:
    """Raise ValueError unless `1 <= value <= largest`."""
    if not 1 <= value <= largest:
        raise ValueError(f"{op}: expected {name} in 1..{largest}, got {value}")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all given tensors share one floating dtype (autocast may mix them)."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{op}: expected a floating-point {name}, got {t.dtype}")
    if torch.is_autocast_enabled(next(iter(given.values())).device.type):
        return
    if len({t.dtype for t in given.values()}) > 1:
        got = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"{op}: expected one dtype, got {got}")
