"""Activations of MLPs that are kept for backward instead of made again there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch

from elastic_kernels.dispatch import holding

_kept: ContextVar[bool] = ContextVar("kept_activations", default=False)


def kept_activations(keep: bool = True) -> AbstractContextManager[None]:
    """Let Triton's MLPs keep their activations for backward: less time, more memory, the same results.

    Without the context they keep the sums before an activation alone, and backward writes the activation once
    more, for the gradient of the second layer's weight. With it backward reads what forward wrote: it writes
    `rows * hidden` elements less, and as many live from forward to backward. MLPs with a gate or of mixed
    widths, and those without Triton, keep it anyway. What `torch.compile` traces does not see the context.

    Args:
        keep: False is as without the context.

    Example:
        >>> import torch
        >>> from elastic_kernels import ElasticMLP, kept_activations
        >>> mlp, x = ElasticMLP(64, 256), torch.randn(10, 32)
        >>> with kept_activations():
        ...     y = mlp(x)
        >>> y.sum().backward()
        >>> mlp.fc2.weight.grad.shape
        torch.Size([64, 256])
    """
    return holding(_kept, keep)


def keeps_activations() -> bool:
    """Whether the context says so."""
    return not torch.compiler.is_compiling() and _kept.get()
