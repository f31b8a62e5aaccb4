"""Reading weights from files that may be anything, and into modules that want exactly theirs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from poa.errors import InputError, as_input, one_line


def read_weights(path: Path, *, mapped: bool = False) -> Any:
    """Load a file of `torch.save` without running anything in it, or a safetensors file.

    Args:
        path: of the file.
        mapped: leave the tensors in the file until they are used.

    Raises:
        InputError: no such file, truncated, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file of weights, got no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            named = not any("\ud800" <= letter <= "\udfff" for letter in str(path))  # what torch can map
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and named)
    except Exception as error:
        reason = (str(error) or one_line(error)).splitlines()[0].split(". ")[0]
        raise InputError(
            f"{path}: expected a complete file of weights only, got a damaged or foreign one: "
            f"{type(error).__name__}: {reason}"
        ) from None


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """`load_state_dict` that wants exactly the module's names and shapes, with a one-line error."""
    with as_input(f"{name}: expected weights"):
        _require_same(module, state, name)
        module.load_state_dict(state)


def _require_same(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise InputError(
            f"{name}: {len(missing)} expected weights missing (first: {(missing or ['none'])[0]}), "
            f"{len(unknown)} unknown (first: {(unknown or ['none'])[0]})"
        )
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise InputError(
                f"{name}: {key}: expected shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}"
            )
