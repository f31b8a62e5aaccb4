"""Time the settings of kernels on this GPU, for the operators that a step calls.

    with record() as calls:
        step()  # on any device; on meta tensors within `dispatch.planning`, it takes no time
    for line in tune(calls, cache_file(gpu_name(device)), minutes=9, device=device):
        print(line)

Operators are called with random tensors of the recorded shapes, the most expensive first. Settings that do
not compile, spill, exceed the GPU's resources or give another result than the fallback are left out.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from elastic_kernels import tuning
from elastic_kernels.absent_gpu import absent_gpu
from elastic_kernels.tuning import Entry, Key, power_of_2

# Of random tensors of these operators, no address is formed that does not exist.
OPERATORS = ("linear_", "attention_", "window_attention_", "layer_norm_", "group_norm_", "prototype_losses_")
DEVIATION = 0.02  # of the random values: everything is finite in fp16, exponentials too
# Of the largest value: two steps of a rounded result, and for fp32 sums in another order.
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
ROUGH, THOROUGH = 20, 100  # milliseconds


class TensorLike(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A call of an operator; tensors are a `TensorLike`, lists are tuples."""

    operator: Any
    arguments: tuple[Any, ...]

    def make(self, device: torch.device) -> list[Any]:
        """Arguments of random values; indices choose the first rows, each once, or targets in turn."""
        names = [argument.name for argument in self.operator._schema.arguments]
        given = dict(zip(names, self.arguments, strict=False))

        def indices(name: str, number: int, size: int) -> Tensor:
            values = torch.arange(size, device=device)
            if name == "places":  # of tokens among the rows of dy
                return torch.where(values < given["dy"].shape[0], values, -1)
            if "t" not in given:
                return values
            targets = given["t"] if isinstance(given["t"], TensorLike) else given["t"][number]
            return values % targets.shape[0]

        def made(name: str, x: Any, number: int = 0) -> Any:
            """Of an argument; `number` is its place in a list."""
            if isinstance(x, TensorLike):
                size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride, strict=True))
                if x.dtype.is_floating_point:
                    values = torch.randn(size, device=device).mul_(DEVIATION)
                else:
                    values = indices(name, number, size)
                return values.to(x.dtype).as_strided(x.shape, x.stride)
            return [made(name, y, number) for number, y in enumerate(x)] if isinstance(x, tuple) else x

        return [made(name, x) for name, x in given.items()]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "elastic_kernels" and function.__name__.startswith(OPERATORS):
            self.calls[Call(function, _frozen(args))] += 1
        return function(*args, **(kwargs or {}))


def _frozen(x: Any) -> Any:
    if isinstance(x, Tensor):
        return TensorLike(tuple(x.shape), x.stride(), x.dtype)
    return tuple(map(_frozen, x)) if isinstance(x, (list, tuple)) else x


@contextmanager
def record() -> Iterator[Counter[Call]]:
    """Count the calls of operators whose kernels can be tuned while the context lasts."""
    with _Recorder() as recorder:
        yield recorder.calls


class _Trial(dict[Key, Any]):
    """Settings on trial; remembers the fallback of whatever is looked up."""

    def __init__(self, settings: dict[Key, Any]) -> None:
        super().__init__(settings)
        self.met: dict[Key, Any] = {}

    def get(self, key: Key, fallback: Any = None) -> Any:
        self.met.setdefault(key, fallback)
        return super().get(key, fallback)


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that Triton launches while the context lasts."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def remembered(self: Any, *args: Any, **options: Any) -> Any:
        kernels.append(run(self, *args, **options))
        return kernels[-1]

    JITFunction.run = remembered
    try:
        yield kernels
    finally:
        JITFunction.run = run


def timed(run: Callable[[], Any], milliseconds: float) -> list[float]:
    """Times in microseconds, for about so long; the host works ahead while the GPU clears its L2 cache."""
    from triton.testing import do_bench

    return [ms * 1e3 for ms in do_bench(run, milliseconds / 4, milliseconds, return_mode="all")]


class Rejected(Exception):
    """Why a call, or settings, are left out."""


class _Operator:
    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.device, self.arguments = call, device, call.make(device)

    def __call__(self) -> Any:
        return self.call.operator(*self.arguments)

    def results(self) -> tuple[list[Tensor], int]:
        """What the operator returns and what it was given, some of which it may change; spilled registers.
        Raises Rejected: it does not compile, or exceeds what the GPU has."""
        arguments = tree_map(lambda x: _copy(x) if isinstance(x, Tensor) else x, self.arguments)
        results, reason = None, ""
        with launched() as kernels:
            try:
                results = self.call.operator(*arguments)
            except Exception as error:  # of Triton or another provider
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # raises if the kernel left the device unusable
        if reason:
            raise Rejected(reason)
        tensors = [x for x in tree_leaves((results, arguments)) if isinstance(x, Tensor)]
        return tensors, max((kernel.n_spills for kernel in kernels), default=0)


def _copy(x: Tensor) -> Tensor:
    """With its strides, which `clone` would not keep."""
    storage = x.untyped_storage().clone()
    return x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())


def _are_partials(ours: Tensor, theirs: Tensor) -> bool:
    """Sums of the rows of each program, `[programs, kinds, width]`: other settings give it other rows."""
    return ours.shape != theirs.shape or (ours.dim() == 3 and ours.dtype == torch.float32)


def _compare(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        if ours.is_floating_point() and ours.numel():
            if _are_partials(ours, theirs):
                ours, theirs = ours.sum(0), theirs.sum(0)
            error = float((ours.float() - theirs.float()).abs().max())
            limit = ROUNDING[ours.dtype] * float(theirs.abs().max())
            if not error <= limit:
                raise Rejected(f"differs by {error:.2g} from the fallback, expected at most {limit:.2g}")


def _fastest(
    operator: _Operator, key: Key, fallback: Any, table: _Trial, ends: float
) -> Generator[str, None, Entry | None]:
    """Time what a key can have; None if that takes too long. Yields what is left out."""
    table[key] = fallback
    expected, _ = operator.results()
    times = {fallback: timed(operator, THOROUGH)}
    for settings in tuning.TUNABLES[key.kernel].candidates(*key.shape):
        if settings in times or not tuning.is_installed(settings):
            continue
        if time.monotonic() >= ends:
            return None
        table[key] = settings
        try:
            results, spills = operator.results()
            if spills:
                raise Rejected(f"spills {spills} registers")
            _compare(results, expected)
        except Rejected as reason:
            yield f"    {settings}: left out, {reason}"
        else:
            times[settings] = timed(operator, THOROUGH)
    medians = {settings: statistics.median(us) for settings, us in times.items()}
    table[key] = fastest = min(medians, key=lambda settings: medians[settings])
    return Entry(key, fastest, medians[fastest], medians[fallback], len(times[fastest]))


def _merged(calls: Counter[Call]) -> Counter[Call]:
    """Calls that differ in how many rows there are, within a class, count as the most frequent of them."""
    merged: Counter[Call] = Counter()
    leaders: dict[Any, Call] = {}
    for call, count in calls.most_common():
        merged[leaders.setdefault((call.operator, _class_of(call.arguments)), call)] += count
    return merged


def _class_of(x: Any) -> Any:
    if isinstance(x, TensorLike):
        return (x.dtype, power_of_2(x.shape[0]) if x.shape else 1, x.shape[1:])
    if isinstance(x, tuple):
        return tuple(map(_class_of, x))
    return power_of_2(x) if type(x) is int else x


class _Work(NamedTuple):
    """A call, the time that all such calls take, and the fallbacks of what can be tuned in it."""

    us: float
    call: Call
    fallbacks: dict[Key, Any]


def _survey(
    calls: Counter[Call], table: _Trial, device: torch.device, ends: float
) -> Generator[str, None, list[_Work]]:
    """Time the calls that have something left to choose; the most expensive first."""
    work, known = [], set(table)
    for call, count in _merged(calls).items():
        if time.monotonic() >= ends:
            yield "time is up before each call was timed once"
            break
        table.met.clear()
        try:
            operator = _Operator(call, device)
            operator.results()
        except (Rejected, torch.OutOfMemoryError) as reason:
            yield f"{call}: left out, {reason}"
            continue
        if table.met.keys() - known:
            work.append(_Work(count * statistics.median(timed(operator, ROUGH)), call, dict(table.met)))
    return sorted(work, key=lambda one: one.us, reverse=True)


def compile_all(calls: Counter[Call], architecture: str, folder: Path) -> Iterator[str]:
    """Compile what `tune` would try on a GPU, such as sm_90, which may be absent, on all CPUs.

    `TRITON_CACHE_DIR` names the folder for `tune` then. There is a line for each binary. Raises ValueError:
    an architecture that is not known, or Triton does not compile here.
    """
    table = _Trial({})
    with absent_gpu(architecture) as launches, tuning.trial(table):
        for call in _merged(calls):
            operator = _Operator(call, torch.device("meta"))
            table.met.clear()
            operator()
            for key in list(table.met):
                for settings in tuning.TUNABLES[key.kernel].candidates(*key.shape):
                    if getattr(settings, "provider", "triton") == "triton":
                        table[key] = settings
                        operator()
    for number, name in enumerate(launches.compile_into(folder), 1):
        yield f"{number:>5} of {len(launches.binaries)}: {name}"


def tune(calls: Counter[Call], path: Path, minutes: float, device: torch.device) -> Iterator[str]:
    """Find the fastest settings of the kernels of calls as `record` counts them, as many as the minutes
    allow.

    The table at `path` is written after each, and what it holds already is kept: a later call continues.
    There are lines of results. Raises ValueError: `path` holds something else than a table of this GPU and
    these versions.
    """
    ends = time.monotonic() + 60 * minutes
    head = tuning.header(device)
    entries = {entry.key: entry for entry in tuning.read(path, head)}
    table = _Trial({key: entry.settings for key, entry in entries.items()})
    with tuning.trial(table):
        work = yield from _survey(calls, table, device, ends)
        open_keys = {key for one in work for key in one.fallbacks} - entries.keys()
        yield f"{len(open_keys)} settings to choose, in {len(work)} different calls; {len(entries)} are known"
        for one in work:
            operator = None
            for key in [key for key in one.fallbacks if key in open_keys]:
                operator = operator or _Operator(one.call, device)
                entry = yield from _fastest(operator, key, one.fallbacks[key], table, ends)
                if entry is None:
                    yield (
                        f"time is up: {len(open_keys)} settings are not tuned yet; "
                        "run the same command to continue"
                    )
                    return
                open_keys.discard(key)
                entries[key] = entry
                tuning.write(path, head, list(entries.values()))
                yield f"{entry}"
