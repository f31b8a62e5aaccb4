"""Gradient checkpointing whose second run takes the backend and the working weights of the first."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elastic_kernels.shared_gradients import stop_sharing


def recomputed(function: Callable[..., Tensor], *inputs: object, **options: object) -> Tensor:
    """`function(*inputs, **options)`, of which only the inputs are kept, and which backward runs again.

    On a GPU backward runs in another thread, which knows no context variables of this one.
    """
    context = copy_context()
    context.run(stop_sharing)  # what runs again cannot be waited for
    result = checkpoint(lambda *given: context.run(function, *given, **options), *inputs, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result
