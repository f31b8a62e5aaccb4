"""Choosing the training device and moving tensors to it."""

from __future__ import annotations

import torch
from torch import Tensor

from poa.errors import InputError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (CUDA where there is one, else CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: CUDA was asked for and is not there, or the name is no device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device: expected a CUDA device for 'cuda', but torch sees none")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise InputError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
    elif device.type != "cpu":
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; to a GPU without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
