"""Launch settings that were timed on a GPU: tables, and how kernels look settings up in them.

A kernel chooses its settings by a function of shapes and compute capability, the fallback, which is all there
is without a table. `python -m elastic_kernels tune` writes a table for a GPU by its name: of each kernel,
dtype and class of shapes the fastest settings, with the time of both. Tables are found in the package, if the
GPU was measured and the result committed, and in the user's cache folder, whose entries come before the
package's. A table of other versions, or a damaged one, is ignored with a warning; settings whose kernel is of
a package that is not installed give way to the fallback.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from elastic_kernels.dispatch import holding

C = TypeVar("C")
PACKAGED = Path(__file__).parent / "tuned"
TILE = 128  # features of the widest tile that every GPU has: classes of widths are multiples of it
TUNABLES: dict[str, Tunable] = {}


class Key(NamedTuple):
    """What settings are timed for: a kernel, the dtype of its input, a class of shapes."""

    kernel: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kernel} {_name(self.dtype)} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Tunable:
    """A kernel whose settings tables may hold.

    Attributes:
        name: in tables.
        candidates: of the numbers of a class of shapes, the settings worth timing: frozen dataclasses, the
            fallback of every GPU among them.
    """

    name: str
    candidates: Callable[..., Sequence[Any]]

    def __post_init__(self) -> None:
        TUNABLES[self.name] = self

    def choose(self, x: Tensor, shape: tuple[int, ...], fallback: C) -> C:
        """The settings of the table of the GPU of `x` for a class of shapes, or the fallback."""
        trial = _trial.get()
        table = table_of(x.device) if trial is None else trial
        return fallback if table is None else table.get(Key(self.name, x.dtype, shape), fallback)


def is_installed(settings: Any) -> bool:
    """Whether the package is, whose kernel settings name as their `provider`."""
    return find_spec(getattr(settings, "provider", "triton")) is not None


def power_of_2(n: int) -> int:
    """The class of a number of rows: the next power of 2."""
    return 1 << max(n - 1, 0).bit_length()


def tiles(n: int) -> int:
    """The class of a number of features: the next multiple of `TILE`."""
    return -(-n // TILE) * TILE


@dataclass(frozen=True)
class Entry:
    """The fastest settings for a key, and how often they were timed; `us` and `fallback_us` are median times
    of the operator with these and with the fallback, in microseconds."""

    key: Key
    settings: Any
    us: float
    fallback_us: float
    samples: int

    def __str__(self) -> str:
        times = f"{self.us:.1f} us, fallback {self.fallback_us:.1f} us, {self.samples} samples"
        return f"{self.key}: {times}: {self.settings}"


def header(device: torch.device) -> dict[str, str]:
    """What a table must agree with."""
    return {"gpu": gpu_name(device), "torch": torch.__version__, "triton": version("triton")}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def cache_file(gpu: str) -> Path:
    """Where a user's table for a GPU lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, as its specification says
    cache = cache if cache.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return cache / "elastic_kernels" / _file_name(gpu)


def write(path: Path, head: dict[str, str], entries: Sequence[Entry]) -> None:
    """Replace a table."""
    lines = [
        json.dumps(
            {
                "kernel": entry.key.kernel,
                "dtype": _name(entry.key.dtype),
                "shape": entry.key.shape,
                "settings": asdict(entry.settings),
                "us": round(entry.us, 2),
                "fallback_us": round(entry.fallback_us, 2),
                "samples": entry.samples,
            }
        )
        for entry in entries
    ]
    body = json.dumps(head)[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_text(body)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, head: dict[str, str]) -> list[Entry]:
    """The entries of a table; none if there is no file. Raises ValueError: it was not made by this GPU and
    these versions, or holds something else than a table does."""
    try:
        document = json.loads(path.read_text())
        for name, expected in head.items():
            if document[name] != expected:
                raise ValueError(f"expected a table of {name} {expected}, got {document[name]}")
        return [_entry(**entry) for entry in document["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        got = "" if type(error) is ValueError else f"expected settings, got {type(error).__name__}: "
        raise ValueError(f"{path}: {got}{error}") from error


def _entry(
    kernel: str, dtype: str, shape: list[int], settings: Any, us: float, fallback_us: float, samples: int
) -> Entry:
    from elastic_kernels.triton_ops import (  # noqa: F401, each names its kernels
        attention,
        gemm,
        group_norm,
        layer_norm,
        prototypes,
        window_attention,
    )

    key = Key(kernel, getattr(torch, dtype), tuple(shape))
    if kernel not in TUNABLES:
        raise ValueError(f"expected kernels {', '.join(TUNABLES)}, got {kernel}")
    for candidate in TUNABLES[kernel].candidates(*shape):
        if asdict(candidate) == settings:
            return Entry(key, candidate, us, fallback_us, samples)
    raise ValueError(f"{key}: expected settings that it can have, got {settings}")


@lru_cache
def table_of(device: torch.device) -> dict[Key, Any] | None:
    """Settings by what they are for on a device, of the package and of the user; None if there are none."""
    if device.type != "cuda":
        return None
    table: dict[Key, Any] = {}
    head = header(device)
    for path in (PACKAGED / _file_name(head["gpu"]), cache_file(head["gpu"])):
        try:
            entries = [entry for entry in read(path, head) if is_installed(entry.settings)]
            table |= {entry.key: entry.settings for entry in entries}
        except ValueError as error:
            warnings.warn(f"elastic_kernels ignores a table of settings: {error}", stacklevel=2)
    return table or None


_trial: ContextVar[dict[Key, Any] | None] = ContextVar("trial", default=None)


def trial(table: dict[Key, Any]) -> AbstractContextManager[None]:
    """Look settings up in this table alone while the context lasts, in this thread."""
    return holding(_trial, table)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
