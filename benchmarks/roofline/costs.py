"""What a kernel costs, what a device can do, and sums of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from poa.flops import DATASHEET_PEAKS

HALF, SINGLE = 2, 4  # bytes of an element


@dataclass(frozen=True)
class Ceilings:
    """What a device can do.

    Attributes:
        matmul: FLOP/s of a large bf16 product.
        copy: bytes/s of a device copy, read and written.
        peak: FLOP/s of the datasheet, dense bf16; the denominator of MFU. None where it is unknown.
        source: measured, or from where.
    """

    matmul: float
    copy: float
    peak: float | None
    source: str


def _stated(name: str, matmul: float, copy: float) -> Ceilings:
    source = f"stated: 8192^3 bf16 product and device copy of an {name}, published"
    return Ceilings(matmul, copy, DATASHEET_PEAKS[name], source)


H100 = _stated("NVIDIA H100 80GB HBM3", 798e12, 3.0e12)
H200 = _stated("NVIDIA H200", 788e12, 4.3e12)
GPUS = {"h100": H100, "h200": H200}


@dataclass(frozen=True)
class Cost:
    """One kernel of a step, or several alike.

    Attributes:
        part: teacher, intact, elastic or update.
        phase: forward, backward or update.
        kernel: its name.
        flops, executed, bytes: see above.
        launches: how many.
    """

    part: str
    phase: str
    kernel: str
    flops: float
    executed: float
    bytes: float
    launches: float = 1

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds at the ceilings."""
        return max(self.executed / ceilings.matmul, self.bytes / ceilings.copy)

    def times(self, count: float) -> Cost:
        """That many of it."""
        return dataclasses.replace(
            self,
            flops=self.flops * count,
            executed=self.executed * count,
            bytes=self.bytes * count,
            launches=self.launches * count,
        )


def product(
    part: str,
    phase: str,
    kernel: str,
    rows: float,
    out: float,
    width: float,
    *,
    stored: float = HALF,
    extra: float = 0.0,
    count: float = 1,
) -> Cost:
    """`[rows, width] x [width, out]` in half precision; `stored` bytes of an element of the result."""
    flops = 2.0 * rows * out * width
    moved = HALF * (rows * width + width * out) + stored * rows * out
    return Cost(part, phase, kernel, flops * count, flops * count, moved * count + extra, count)


def stream(part: str, phase: str, kernel: str, moved: float, count: float = 1) -> Cost:
    """A kernel that only moves bytes."""
    return Cost(part, phase, kernel, 0.0, 0.0, moved, count)


@dataclass(frozen=True)
class Summary:
    """A step's totals; seconds at the ceilings."""

    flops: float
    executed: float
    bytes: float
    launches: float
    floor: float
    overlap: float

    @classmethod
    def of(cls, costs: Iterable[Cost], ceilings: Ceilings) -> Summary:
        costs = list(costs)
        executed, moved = sum(c.executed for c in costs), sum(c.bytes for c in costs)
        return cls(
            sum(c.flops for c in costs),
            executed,
            moved,
            sum(c.launches for c in costs),
            sum(c.floor(ceilings) for c in costs),
            max(executed / ceilings.matmul, moved / ceilings.copy),
        )

    def mfu(self, seconds: float, ceilings: Ceilings) -> float | None:
        """Model FLOPs utilisation of a step that takes so long, where the peak is known."""
        return self.flops / seconds / ceilings.peak if ceilings.peak else None
