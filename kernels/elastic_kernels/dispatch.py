"""Which backend runs an operator, and why.

Backends are `reference`, the plain PyTorch definition, and `triton`; attention also has `sdpa` and
`xformers`. Without being told, an operator takes Triton for CUDA tensors of a supported dtype and shape, and
PyTorch otherwise. The environment variable `ELASTIC_KERNELS_BACKEND`, read when the package is imported, or
`backend(...)` forces one; a forced backend that cannot run is an error, never replaced. Operators that have
no backend of the forced name choose as always.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib.metadata import version
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ENVIRONMENT_VARIABLE = "ELASTIC_KERNELS_BACKEND"
BACKENDS = ("reference", "triton", "sdpa", "xformers")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors
RELEASES = {  # which torch.compile cannot ask for
    package: tuple(map(int, version(package).split(".")[:2]))
    for package in ("triton", "numpy")
    if HAS_TRITON and INTERPRETED
}


class Choice(NamedTuple):
    """A backend, and the reason in a few words."""

    backend: str
    reason: str


class Gpu(NamedTuple):
    """What launchers ask about a GPU: its compute capability, and its streaming multiprocessors."""

    capability: tuple[int, int]
    processors: int


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_default = os.environ.get(ENVIRONMENT_VARIABLE) or None
if _default is not None:
    _checked(_default)
_forced: ContextVar[str | None] = ContextVar("backend", default=_default)
_planned: ContextVar[torch.dtype | None] = ContextVar("planning", default=None)
_absent: ContextVar[Gpu | None] = ContextVar("absent", default=None)


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Let a context variable have a value while the context lasts."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def backend(name: str) -> AbstractContextManager[None]:
    """Force a backend for all operators of this thread while the context lasts.

    What `torch.compile` traces in the context keeps the backend.

    Args:
        name: "reference" or "triton"; "sdpa" or "xformers" force attention alone.

    Raises:
        ValueError: another name.

    Example:
        >>> import torch
        >>> from elastic_kernels import backend, packed_attention
        >>> with backend("reference"):
        ...     packed_attention(torch.randn(4, 3, 2, 16), [(1, 4)]).shape
        torch.Size([4, 32])
    """
    return holding(_forced, _checked(name))


def planning(products: torch.dtype) -> AbstractContextManager[None]:
    """Take meta tensors for those of a GPU, with products in a dtype, as under its autocast.

    Operators then give shapes and dtypes and compute nothing: for the planning of memory and launches.

    Args:
        products: float32, float16 or bfloat16.

    Example:
        >>> import torch
        >>> from elastic_kernels import elastic_linear, planning
        >>> x, W = torch.empty(5, 32, device="meta"), torch.empty(64, 48, device="meta")
        >>> with planning(torch.bfloat16):
        ...     elastic_linear(x, W).dtype
        torch.bfloat16
    """
    return holding(_planned, products)


def forced() -> str | None:
    """The backend that `backend(...)` or the environment forces."""
    return _forced.get()


def planned() -> torch.dtype | None:
    """The dtype of products that `planning(...)` asks for; None outside of it."""
    return _planned.get()


def assuming(gpu: Gpu) -> AbstractContextManager[None]:
    """Take meta tensors for those of an absent GPU; `absent_gpu` also records launches."""
    return holding(_absent, gpu)


def absent() -> Gpu | None:
    """The GPU for whose tensors meta tensors are taken; None outside of `assuming(...)`."""
    return _absent.get()


# Dynamo traces no context variables before torch 2.14. This is what `torch.compiler.assume_constant_result`
# does, which would make everybody who imports this package wait for dynamo.
forced._dynamo_marked_constant = planned._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of matrix products on a device, or None where it is off."""
    kind = device.type
    if kind == "meta":
        return planned()
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where products keep the dtype of their operands."""
    if device.type == "meta":  # not `torch.amp.is_autocast_available`, which torch 2.11 cannot compile
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_operands(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of one of PyTorch's products as its autocast takes them, for meta tensors, which know none."""
    dtype = planned() if operands[0].device.type == "meta" else None
    return operands if dtype is None else tuple(x.to(dtype) for x in operands)


def cached_constant(x: Tensor, make: Callable[..., Tensor], *arguments: object) -> Tensor:
    """A constant tensor for an operation on `x`, from a maker with `lru_cache`.

    Not cached where `x` has no values: under `FakeTensorMode` constants have none either, and must not
    outlive it; nor in a graph, where `torch.compile` warns of caches. Made outside of inference mode: an
    inference tensor would spoil later training.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return make.__wrapped__(*arguments)  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return make(*arguments)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; to a GPU without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `x` runs: its own, or autocast's."""
    return autocast_dtype(x.device) or x.dtype


def choose(op: str, x: Tensor, limit: str | None = None, dtype: torch.dtype | None = None) -> Choice:
    """Triton or the reference for an operator, by the device of an input and its dtype, or that of the
    kernel's work.

    `limit` is why the kernel cannot take this input's shape, or None. Raises RuntimeError: `triton` is forced
    and cannot run.
    """
    wanted = forced()
    if wanted == "reference":
        return Choice("reference", "forced")
    dtype = dtype or x.dtype
    obstacle = _obstacle(x.device.type, dtype) or limit
    if wanted == "triton":
        if obstacle:
            raise RuntimeError(f"{op}: expected to run on triton, which was forced, but {obstacle}")
        return Choice("triton", "forced")
    if obstacle:
        return Choice("reference", obstacle)
    if x.device.type == "cpu":
        return Choice("reference", "interpreted kernels run only when forced")
    return Choice("triton", f"{x.device.type} tensor of {dtype}")


def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on such tensors, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, got {dtype}"
    if device == "cpu" and not INTERPRETED:
        return "the tensors are on a CPU (without TRITON_INTERPRET=1)"
    if device == "cpu" and RELEASES["triton"] < (3, 7) and RELEASES["numpy"] >= (2, 4):
        triton, numpy = (".".join(map(str, RELEASES[package])) for package in ("triton", "numpy"))
        return f"the interpreter of Triton {triton} expected numpy<2.4, got {numpy}"
    if device == "meta" and (planned() or absent()):
        return None
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {device!r}, expected cuda"
    return None
