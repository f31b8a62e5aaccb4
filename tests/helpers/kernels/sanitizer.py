"""The sanitiser: tests of kernels on a device, without one. A plugin of pytest that `make sanitize` runs.

By hand: `ELASTIC_KERNELS_LANE=sanitized .venv-sanitize/bin/python -m pytest tests/kernels/device -k ...`.

ttsem executes the IR that Triton makes of each launch on the CPU, program after program, on copies of the
tensors that it is given. A test fails, with the line of the kernel, if a launch

- reads or writes outside of its tensors;
- touches what another of its programs writes, unless both do so atomically or leave the same bytes.

What nobody wrote is NaN: reading it spoils a result, and so does an output that is not written. Views of one
storage are one tensor: what a corner of a weight must not touch is NaN too, and its gradient must be zero.

Added here: a device that tensors also claim to be on in registered operators and in backward, where ttsem's
ends; tensors that a kernel finds by an address in a table (Sinkhorn, optimiser), which are checked as
arguments are; what the CPU build of PyTorch lacks; and the count of what was executed.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from triton.runtime.jit import JITFunction
from ttsem import harness, sanitize

import elastic_kernels.triton_ops
from elastic_kernels.triton_ops import registration

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
PROCESSORS = 4  # few: loops over the tiles of a program turn more than once at small sizes


def entry_kernels() -> set[str]:
    """Names of the package's kernels that are launched: those that no other one calls."""
    package = elastic_kernels.triton_ops
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    kernels = [member for member in members if isinstance(member, JITFunction)]
    called = {name for kernel in kernels for name in kernel.fn.__code__.co_names}
    return {kernel.__name__ for kernel in kernels} - called


class Addresses:
    """Tensors whose addresses the package asked for, to put them into tables."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def remembering(self, data_ptr: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        """`Tensor.data_ptr` that remembers each tensor that the package asks, and how long it is."""

        def ask(tensor: Tensor) -> int:
            address = data_ptr(tensor)
            who = sys._getframe(1).f_globals.get("__name__", "")
            if who.startswith("elastic_kernels.") and tensor.numel():
                spans = zip(tensor.shape, tensor.stride(), strict=True)
                elements = 1 + sum((size - 1) * stride for size, stride in spans)
                self._asked[address] = StorageWeakRef(tensor.untyped_storage()), elements, tensor.itemsize
            return address

        return ask

    def tensors(self, record: harness.LaunchRecord) -> dict[str, tuple[int, np.ndarray]]:
        """Address and bytes of the living tensors that the int64 arguments of a launch name."""
        tables = {}
        for name, table in record.bound.items():
            if isinstance(table, Tensor) and table.dtype == torch.int64:
                for place, address in enumerate(table.flatten().tolist()):
                    storage, elements, size = self._asked.get(address, (None, 0, 0))
                    if storage and not storage.expired() and address not in record.bases.values():
                        there = (ctypes.c_uint8 * (elements * size)).from_address(address)
                        tables[f"{name}[{place}]"] = address, np.frombuffer(there, f"u{size}")
        return tables


class Launches:
    """Executes launches, and counts those of each kernel and those of more than one program."""

    def __init__(self, addresses: Addresses) -> None:
        self.counts: Counter[str] = Counter()
        self.several = 0
        self._addresses, self._execute, self._memory = addresses, harness.execute, harness.Memory

    def __call__(self, record: harness.LaunchRecord, *args: Any, **options: Any) -> harness.Execution:
        self.counts[record.fn_name] += 1
        self.several += options["trace_access"]
        memory = self._memory()
        for name, (address, array) in self._addresses.tensors(record).items():
            memory.register(address, array)
            record.bases[name], record.pre[name] = address, array  # for the messages
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness, "Memory", lambda: memory)
            return self._execute(record, *args, **options)


class Compiled:
    """The IR of launches, made once for all that Triton would run with one binary."""

    def __init__(self) -> None:
        self._texts: dict[tuple[Any, ...], str] = {}
        harness.mlir.enable_generic_printing()

    def __call__(self, record: harness.LaunchRecord, stage: str, target: Any) -> str:
        settings = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn, record.fn.src, stage, repr(settings))
        if key not in self._texts:
            text = harness.mlir.to_generic(harness._stage_text(record, stage, target))
            # ttsem knows where a line stands, and where a named one does, but not where a called one does.
            self._texts[key] = text.replace("loc(callsite(", 'loc("called"(')
        return self._texts[key]


class Autocast(torch.autocast):
    """Of the CPU, where the tensors are, whatever they claim."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu", *args, **options)


def product(
    c: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """`torch.addmm`, whose result in another dtype only CUDA has."""
    dtype = out_dtype or a.dtype
    return torch.ops.aten.addmm(c, a.to(dtype), b.to(dtype), **options)


def within(mode: TorchFunctionMode, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, under a mode that is off where PyTorch calls it: while the mode handles a call itself."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return call


@contextmanager
def device(patch: pytest.MonkeyPatch) -> Iterator[tuple[sanitize.Session, Launches]]:
    """While it lasts, tensors claim to be on `DEVICE` and launches run under ttsem."""
    with sanitize.session(10 * CAPABILITY[0] + CAPABILITY[1]) as session:
        mode = _get_current_function_mode_stack()[-1]
        register, engine = registration.register, torch.autograd._engine_run_backward
        patch.setattr(registration, "register", lambda name, f, *fake: register(name, within(mode, f), *fake))
        patch.setattr(torch.autograd, "_engine_run_backward", within(mode, engine))
        patch.setattr(Tensor, "device", property(lambda tensor: DEVICE))
        properties = torch.cuda.get_device_properties(DEVICE)
        properties.multi_processor_count = PROCESSORS
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

        patch.setattr(torch.backends.mkldnn, "enabled", False)  # whose half precision differs by CPU
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        # Where PyTorch is built for CUDA, it asks a driver whether the step of an optimiser is captured.
        patch.setattr(Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        patch.setattr(torch, "addmm", product)
        patch.setattr(torch, "autocast", Autocast)
        for ask in (torch.is_autocast_enabled, torch.get_autocast_dtype):
            patch.setattr(torch, ask.__name__, lambda device_type, ask=ask: ask("cpu"))

        addresses = Addresses()
        launches = Launches(addresses)
        patch.setattr(Tensor, "data_ptr", addresses.remembering(Tensor.data_ptr))
        patch.setattr(harness, "execute", launches)
        patch.setattr(harness, "ir_for_launch", Compiled())
        patch.setattr(harness.mlir, "parse", lru_cache(harness.mlir.parse))
        try:
            yield session, launches
        finally:
            patch.undo()


def complaints(launched: Iterable[str], unchecked: int) -> list[str]:
    """What is wrong with a run that was to launch every kernel."""
    problems = []
    if missing := entry_kernels() - set(launched):
        problems.append(f"no test launches {', '.join(sorted(missing))}")
    if unchecked:
        problems.append(f"{unchecked} launches are too large to be checked for races: take smaller sizes")
    return problems


class Plugin:
    """Opens the device for the tests, and tells at the end what all workers of pytest-xdist executed."""

    def __init__(self, every_kernel: bool) -> None:
        self.every_kernel = every_kernel
        self.stack = ExitStack()
        self.session, self.launches = self.stack.enter_context(device(pytest.MonkeyPatch()))
        self.unchecked = 0
        self.complaints: list[str] = []

    def pytest_unconfigure(self) -> None:
        self.stack.close()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error is None:
            counts, several, unchecked = node.workeroutput["sanitizer"]
            self.launches.counts.update(counts)
            self.launches.several += several
            self.unchecked += unchecked

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.unchecked += self.session.races_unchecked
        counts = self.launches.counts
        if hasattr(session.config, "workeroutput"):  # of a worker, for `pytest_testnodedown`
            session.config.workeroutput["sanitizer"] = dict(counts), self.launches.several, self.unchecked
        elif self.every_kernel and session.exitstatus == pytest.ExitCode.OK:
            self.complaints = complaints(counts, self.unchecked)
            if self.complaints:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counts, several = self.launches.counts, self.launches.several
        terminalreporter.write_line(
            f"sanitizer: {counts.total()} launches of {len(counts)} kernels executed, of which "
            f"{several - self.unchecked} checked for races and {counts.total() - several} of one program"
        )
        for complaint in self.complaints:
            terminalreporter.write_line(f"sanitizer: {complaint}", red=True)
