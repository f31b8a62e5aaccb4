"""Counting what Triton compiles, so that a run can show that it waits for no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from elastic_kernels import dispatch


@dataclass
class Compilations:
    """Kernels that Triton compiled because its cache did not have them."""

    count: int = 0


@contextmanager
def compilations() -> Iterator[Compilations]:
    """Count Triton's compilations of all kernels while the context lasts; 0 where Triton is not installed.

    A kernel that comes out of Triton's cache on disk does not count.

    Example:
        >>> import torch
        >>> from elastic_kernels import compilations, elastic_linear
        >>> with compilations() as compiled:
        ...     y = elastic_linear(torch.randn(5, 32), torch.randn(64, 48))
        >>> compiled.count
        0
    """
    counter = Compilations()
    if not dispatch.HAS_TRITON:
        yield counter
        return
    import triton

    knobs = triton.knobs.compilation
    before = knobs.listener

    def listen(**event: Any) -> None:
        counter.count += not event["cache_hit"]
        if before is not None:
            before(**event)

    knobs.listener = listen
    try:
        yield counter
    finally:
        knobs.listener = before
