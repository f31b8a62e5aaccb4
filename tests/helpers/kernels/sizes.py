"""The cases of kernels on a device are written once: real sizes for a GPU, small ones for the sanitiser."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")
SANITIZED = os.environ.get("ELASTIC_KERNELS_LANE") == "sanitized"

gpu_only = pytest.mark.skipif(SANITIZED, reason="about a GPU, not about what a kernel touches")


def sized(real: T, small: T) -> T:
    """`small` under the sanitiser, which is slow: several blocks long, with odd ends, and no more."""
    return small if SANITIZED else real


RUNS = sized(2, 1)  # results must repeat; under the sanitiser, which has one order of programs, they do


class _HostTensor(Tensor):
    device = property(lambda tensor: torch.device("cpu"))  # type: ignore[assignment]
    is_cuda = property(lambda tensor: False)  # type: ignore[assignment]


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor that says so also under the sanitiser, where every tensor claims to be on the GPU."""
    return tensor.as_subclass(_HostTensor) if SANITIZED else tensor
