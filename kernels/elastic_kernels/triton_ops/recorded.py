"""Launches on meta tensors: what a GPU would compile and run, found by the launchers themselves."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from elastic_kernels import triton_ops
from elastic_kernels.dispatch import Gpu, assuming
from elastic_kernels.triton_ops.launching import LaunchedKernel
from elastic_kernels.triton_ops.registration import LAUNCHERS

WARP = 32


@dataclass(frozen=True, eq=False)
class Binary:
    """A kernel as Triton specialises it for a launch; travels between processes.

    Attributes:
        module, name: where the `triton.jit` function is.
        signature: type of each argument.
        constants, attributes: values and divisibility of arguments, by their path, as Triton's `ASTSource`.
        options: launch settings, with Triton's defaults.
        architecture: compute capability times ten.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    architecture: int

    @property
    def kernel(self) -> JITFunction:
        kernel: JITFunction = getattr(importlib.import_module(self.module), self.name)
        return kernel

    @property
    def constexprs(self) -> dict[str, Any]:
        """Compile-time arguments by name, absent tensors (None) among them."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    def compile(self) -> Any:
        """Triton's compiled kernel, which is then in its cache on disk."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.architecture, WARP), options=self.options)


class Launch(NamedTuple):
    """A binary, the programs of its grid, and, if it is kept, what Triton hands to it, arguments last."""

    binary: Binary
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """By name."""
        names = self.binary.kernel.arg_names
        return dict(zip(names, self.rest[-len(names) :], strict=True))

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass
class Launches:
    """What was launched while an absent GPU was in use, in order, and the binaries for it, each once;
    launches hold what they were given if they are to `keep_arguments`."""

    keep_arguments: bool = False
    made: list[Launch] = field(default_factory=list)
    binaries: list[Binary] = field(default_factory=list)

    def compile_into(self, folder: Path, triton_key: str | None = None) -> Iterator[str]:
        """Compile the binaries on all CPUs into a folder that is Triton's cache; the name of each when it is
        ready.

        `triton_key` is `triton.runtime.cache.triton_key()` of the Triton that shall read it, if another one:
        the same version has other keys for other versions of Python.
        """
        context = multiprocessing.get_context("spawn")
        compile_one = partial(_compile, folder.resolve(), triton_key)
        with context.Pool(min(os.cpu_count() or 1, len(self.binaries))) as pool:
            yield from pool.imap_unordered(compile_one, self.binaries)


def _compile(folder: Path, triton_key: str | None, binary: Binary) -> str:
    triton.knobs.cache.dir = str(folder)
    if triton_key is not None:
        triton.runtime.cache.triton_key = lambda: triton_key
    binary.compile()
    return binary.name


@contextmanager
def recorded(gpu: Gpu) -> Iterator[Launches]:
    """See `elastic_kernels.absent_gpu`. Nothing remains of the context in kernels."""
    capability = gpu.capability[0] * 10 + gpu.capability[1]
    launches, driver, compiles = Launches(), _Driver(capability), JITFunction._do_compile
    before, kernels = triton.runtime.driver._active, set()  # `active` fails where there is no GPU

    def specialise(
        kernel: JITFunction, key: str, signature: Any, device: Any, constants: Any, options: Any, *rest: Any
    ) -> _Recorder:
        binary = Binary(
            kernel.module, kernel.fn.__name__, signature, constants, rest[0], vars(options), capability
        )
        launches.binaries.append(binary)
        kernels.add(kernel)
        kernel.device_caches[device][0][key] = recorder = _Recorder(binary, launches)
        return recorder

    for module in pkgutil.iter_modules(triton_ops.__path__, f"{triton_ops.__name__}."):
        importlib.import_module(module.name)  # which registers its operators
    launchers = torch.library.Library("elastic_kernels", "IMPL")
    try:
        for name, launcher in LAUNCHERS.items():
            launchers.impl(name, launcher, "Meta", allow_override=True)
        triton.runtime.driver.set_active(driver)
        JITFunction._do_compile = specialise
        with assuming(gpu):
            yield launches
    finally:
        JITFunction._do_compile = compiles
        triton.runtime.driver.set_active(before)
        launchers._destroy()
        for kernel in kernels:
            kernel.device_caches.pop(driver.device)
            if isinstance(kernel, LaunchedKernel):
                kernel.known.clear()


class _Driver:
    """Stands for Triton's, with a device whose kernels no other device shares."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, WARP)
        self.device = object()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0


class _Recorder:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, binary: Binary, launches: Launches) -> None:
        self.binary, self.launches = binary, launches

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        given: tuple[Any, ...] = ()
        if self.launches.keep_arguments:  # but no gradient itself, which autograd would then copy
            given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in rest)
        self.launches.made.append(Launch(self.binary, (x, y, z), given))
