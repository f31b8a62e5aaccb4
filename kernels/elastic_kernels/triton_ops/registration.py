"""Registration of the Triton operators with `torch.library`, under the namespace `elastic_kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("elastic_kernels", "FRAGMENT")


def register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator, its one implementation for CUDA (and CPU, under the interpreter), and its shapes.

    Gradients belong to the `autograd.Function`s that call the operators: that costs tens of microseconds less
    a call than `register_autograd`.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CUDA", "CPU"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"elastic_kernels::{name}", fake, lib=_library)
