"""A step's launches with all that their cost depends on, recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.launches import LIBRARIES, Operators, step_of
from benchmarks.prediction.programs import Extent
from elastic_kernels import absent_gpu
from elastic_kernels.triton_ops.recorded import Binary, Launch
from elastic_kernels.tuning import TUNABLES, Key, trial
from poa.config import Config
from poa.subnets import Subnet

Product = tuple[int, int, int, int, int]  # batch, rows, columns, inner dimension, bytes of an element


class Kernel(NamedTuple):
    """A launch of ours: of two that are equal, the costs are."""

    binary: Binary
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]


class Operator(NamedTuple):
    """An operator of PyTorch's, with the products that it is made of."""

    kind: str
    name: str
    launches: int
    bytes: int
    products: tuple[Product, ...]


class Recorder(Operators):
    """Notes operators one by one, and what tensors of the host are copied to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.contents: dict[int, tuple[Tensor, Tensor]] = {}  # with the device's, which keeps the key its own
        # Of contents, which launches share, as they may be long.
        self._bytes: dict[tuple[int, int], bytes] = {}

    def note(
        self,
        name: str,
        args: Sequence[Any],
        count: int,
        size: int,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        super().note(name, args, count, size, inputs, outputs)
        products = tuple(_products(name, args, outputs))
        self.operators.append(Operator(LIBRARIES.get(name, "other"), name, count, size, products))
        if name in ("_to_copy", "copy_") and inputs[-1].device.type == "cpu":
            key = outputs[0].untyped_storage()._cdata
            self.contents[key] = inputs[-1].detach().clone(), outputs[0]

    def kernels(self, launches: Sequence[Launch]) -> list[Kernel]:
        """Launches with what is known of their arguments."""

        def arguments(launch: Launch) -> tuple[tuple[str, Any], ...]:
            return tuple((name, self._argument(value)) for name, value in launch.arguments.items())

        return [Kernel(launch.binary, launch.grid, arguments(launch)) for launch in launches]

    def _argument(self, value: Any) -> Any:
        """A kernel's argument, as far as costs depend on it."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, int) else None
        size = value.itemsize
        for length, stride in zip(value.shape, value.stride(), strict=True):
            size *= length if stride or length == 0 else 1
        key, offset = value.untyped_storage()._cdata, int(value.storage_offset())
        if key not in self.contents or value.is_floating_point():
            return Extent(size)
        if (key, offset) not in self._bytes:
            elements = self.contents[key][0].flatten()[offset:]
            self._bytes[key, offset] = elements.long().numpy().tobytes()
        return Extent(size, self._bytes[key, offset])


def _products(name: str, args: Sequence[Any], outputs: list[Tensor]) -> list[Product]:
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = [t for t in args if isinstance(t, Tensor)][-2:]
        return [(a.shape[0] if a.ndim == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1], a.itemsize)]
    if name == "convolution":
        x, weight = args[:2]
        out = outputs[0]
        return [(1, out.numel() // out.shape[1], weight.shape[0], weight[0].numel(), x.itemsize)]
    if name == "convolution_backward":
        dy, x, weight = args[:3]
        places, out, inner = dy.numel() // dy.shape[1], weight.shape[0], weight[0].numel()
        forms = ((1, places, inner, out, x.itemsize), (1, out, inner, places, x.itemsize))
        return [form for form, wanted in zip(forms, args[-1], strict=False) if wanted]
    return []


class PersistentPrograms(dict[Key, Any]):
    """A table of settings with persistent programs, so many a processor, for what may have them."""

    def __init__(self, programs: int) -> None:
        super().__init__()
        self.programs = programs

    def get(self, key: Key, fallback: Any = None) -> Any:
        candidates = TUNABLES[key.kernel].candidates(*key.shape) if self.programs else ()
        return next((c for c in candidates if getattr(c, "persistent", 0) == self.programs), fallback)


def record(config: Config, elastic: Subnet, persistent: int = 0) -> tuple[list[Kernel], list[Operator]]:
    """All that a step launches, ours and PyTorch's, each in order; see `PersistentPrograms`."""
    table = trial(PersistentPrograms(persistent))
    with table, absent_gpu() as launches, Recorder() as recorder, step_of(config, elastic) as step:
        launches.keep_arguments = True
        step()  # makes the optimiser's tables
        launches.made.clear()
        recorder.operators.clear()
        step()
        return recorder.kernels(launches.made), recorder.operators
