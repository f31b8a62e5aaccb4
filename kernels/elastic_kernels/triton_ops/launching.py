"""Kernels that are launched in a fraction of Triton's time, if they were launched so before.

Triton asks what it makes of each argument and looks the answers up as text, which takes the host 12 us for a
launch of 20 arguments; here the arguments themselves are looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; Triton compiles wide accesses for addresses that are multiples of it
INT32_MAX = 2**31 - 1
MOST_KNOWN = 4096  # ways to launch a kernel: numbers that never come again must not fill the memory

_run = JITFunction.run if JITFunction.run.__module__ == JITFunction.__module__ else None  # Triton's own


def _is_watched() -> bool:
    """Whether others want to see launches: by hooks of Triton, or in place of its `run`."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bool(hooked) or JITFunction.run is not _run


class LaunchedKernel(JITFunction):
    """A `triton.jit` function of pointers `x_ptr` and numbers, then of compile-time arguments by keyword.

    Attributes:
        known: Triton's compiled kernel and its compile-time arguments, by device and way to launch it.
    """

    def __init__(self, function: Callable[..., Any], do_not_specialize: list[str]) -> None:
        super().__init__(function, do_not_specialize=do_not_specialize)
        given = [p for p in self.params if not p.is_constexpr]
        pointers = [p.num for p in given if p.name.endswith("_ptr")]
        self._loose = [p.num for p in given if p.do_not_specialize]
        values = [p.num for p in given if p.num not in (*pointers, *self._loose)]
        self._pointers = itemgetter(*pointers)
        self._values: Callable[..., Any] = itemgetter(*values) if values else len
        self.known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return super().__getitem__(grid) if _is_watched() else partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        device = driver.active.get_current_device()
        pointers = [
            None if p is None else (p.dtype, p.data_ptr() % ALIGNMENT) for p in self._pointers(arguments)
        ]
        key = (device, *pointers, self._values(arguments), *constants.items())
        known = self.known.get(key)
        if known is None or not self._fits(arguments):
            return self._launch_first(key, grid, arguments, constants)
        binary, rest = known
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        binary.run(
            x, y, z, stream, binary.function, binary.packed_metadata, None, None, None, *arguments, *rest
        )
        return binary

    def _fits(self, arguments: tuple[Any, ...]) -> bool:
        """Whether numbers that are not specialised have 32 bits: binaries differ by that."""
        for place in self._loose:  # noqa: SIM110, `all` takes longer
            if arguments[place] > INT32_MAX:
                return False
        return True

    def _launch_first(
        self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]
    ) -> Any:
        binary = super().__getitem__(grid)(*arguments, **constants)
        if len(self.known) >= MOST_KNOWN:
            self.known.clear()
        if binary is not None and self._fits(arguments):
            rest = self.params[len(arguments) :]
            self.known[key] = binary, tuple(constants.get(p.name, p.default) for p in rest)
        return binary


def launched(*do_not_specialize: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel that launchers launch, instead of `triton.jit`; under the interpreter it is the same.

    Not to be specialised are numbers that differ from launch to launch; they do not tell launches apart.
    """
    if knobs.runtime.interpret:
        return triton.jit(do_not_specialize=list(do_not_specialize))
    return partial(LaunchedKernel, do_not_specialize=list(do_not_specialize))
