"""Registration of the Triton operators with `torch.library`, under the namespace `elastic_kernels`, and what
their `autograd.Function`s share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from elastic_kernels.dispatch import absent

_library = torch.library.Library("elastic_kernels", "FRAGMENT")
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # of every operator, by its name
ops = SimpleNamespace()  # the operators, without PyTorch's dispatcher where nothing would notice


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that launches on the device of its first argument, a tensor or several.

    Triton launches on the current device and stream, wherever the tensors are.
    """

    @functools.wraps(function)
    def guarded(first: Tensor | list[Tensor], *rest: Any, **options: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.is_meta or (tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()):
            return function(first, *rest, **options)
        with torch.cuda.device_of(tensor):
            return function(first, *rest, **options)

    return guarded


def register(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any] = lambda *arguments: None
) -> None:
    """Define an operator, its one implementation for CUDA (and CPU, under the interpreter), and its shapes,
    which need not be given where it returns nothing.

    Gradients belong to the `autograd.Function`s that call the operators: that costs tens of microseconds less
    a call than `register_autograd`.
    """
    name = schema.partition("(")[0]
    LAUNCHERS[name] = launcher = on_its_device(function)
    _library.define(schema)
    for device in ("CUDA", "CPU"):
        _library.impl(name, launcher, device)
    torch.library.register_fake(f"elastic_kernels::{name}", fake, lib=_library)
    setattr(ops, name, _in_short(launcher, getattr(torch.ops.elastic_kernels, name)))


def _in_short(launcher: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, launched at once unless it is traced, some mode watches, or there is nothing to launch.

    That saves ten microseconds a call.
    """

    @functools.wraps(launcher)
    def call(first: Tensor | list[Tensor], *rest: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return operator(first, *rest)
        tensor = first if isinstance(first, Tensor) else first[0]
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        launches = plain and (not tensor.is_meta or absent() is not None)
        return (launcher if launches else operator)(first, *rest)

    return call


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a backward with `create_graph=True` through operators that have no second derivatives.

    PyTorch's `once_differentiable` lets it pass where the upstream gradient needs no gradient itself, and a
    gradient penalty would silently be without them.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "elastic_kernels: expected a backward with create_graph=False, got create_graph=True: Triton "
                "kernels have no second derivatives; the plain definitions have, with backend('reference')"
            )
        return backward(ctx, *gradients)

    return checked
