"""Gradient checkpointing whose second run takes the backend and the working weights of the first."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elastic_kernels.shared_gradients import stop_sharing


def recomputed(function: Callable[..., Tensor], *inputs: object, **options: object) -> Tensor:
    """`function(*inputs, **options)`, of which only the inputs are kept, and which backward runs again.

    On a GPU backward runs in another thread, which knows no context variables of this one.
    """
    if torch.compiler.is_compiling():  # a graph is traced once, its second run asks no context
        again = partial(function, **options)
    else:
        context = copy_context()
        context.run(stop_sharing)  # what runs again cannot be waited for
        again = partial(context.run, function, **options)
    result = checkpoint(again, *inputs, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result
