"""Providers that fail lose only themselves: what measuring yields, and what is left after an error."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from benchmarks.results import Row


class Unavailable(Exception):
    """A provider cannot run here; says why."""


def require_cuda(device: torch.device) -> None:
    """Raise Unavailable on another device."""
    if device.type != "cuda":
        raise Unavailable("runs on CUDA only")


class DeviceLost(Exception):
    """A CUDA error after which every later call of this process fails."""

    def __init__(self, provider: str, reason: str):
        super().__init__(reason)
        self.provider, self.reason = provider, reason


class Trying(NamedTuple):
    """A provider is at work, until the next event; it is to blame if none comes."""

    provider: str


class Refused(NamedTuple):
    """A provider that is not measured, or not in all modes."""

    provider: str
    reason: str


class Settled(NamedTuple):
    """A provider that need not be tried again if its case is."""

    provider: str


Event = Row | Trying | Refused | Settled


class Failures(dict[str, str]):
    """Why providers failed, by name; the others continue."""

    _litter = False  # what the last failure's traceback kept alive is still there

    def spared(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self]

    @contextlib.contextmanager
    def of(self, provider: str) -> Iterator[None]:
        """Catch what a provider raises. Raises DeviceLost: nothing more can run in this process."""
        if self._litter:
            free_memory()
            self._litter = False
        try:
            yield
        except Exception as error:  # peers fail in their own ways
            self._litter, self[provider] = True, reason_of(error)
            if is_device_lost():
                raise DeviceLost(provider, self[provider]) from error


def reason_of(error: Exception) -> str:
    """One line."""
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, Unavailable) else f"{type(error).__name__}: {first}"


def is_device_lost() -> bool:
    """Whether a CUDA error has left this process without its device."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
