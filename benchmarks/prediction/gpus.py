"""What a GPU of a name can do, for the prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.roofline import H100, H200, Ceilings

TENSOR_FLOPS = 4096  # a multiprocessor and cycle, dense bf16; Hopper
FP32_FLOPS = 256
L2_BYTES = 5120  # a cycle, all multiprocessors; as published for the A100
LAUNCH = (
    2e-6  # seconds from the end of one kernel to the work of the next, and until its last block has ended
)
TILES = ((128, 256), (256, 128))  # of cuBLAS's products
FILL = 128  # steps of the inner dimension in whose time a tile begins and ends
SPLITS = 16  # at most, of the inner dimension


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as the driver says it.
        ceilings: of products and copies.
        processors: streaming multiprocessors.
    """

    name: str
    ceilings: Ceilings
    processors: int

    @property
    def clock(self) -> float:
        """Cycles a second that its datasheet's peak is for."""
        return (self.ceilings.peak or self.ceilings.matmul) / (self.processors * TENSOR_FLOPS)

    @property
    def tensor_cycles(self) -> float:
        """For one cycle of the matrix units, as fast as a large product keeps them."""
        return self.clock * self.processors * TENSOR_FLOPS / self.ceilings.matmul

    def moving(self, size: float) -> float:
        """Seconds of reading and writing so many bytes of memory."""
        return size / self.ceilings.copy

    def caching(self, size: float) -> float:
        """Seconds of moving so many bytes between processors and L2."""
        return size / (L2_BYTES * self.clock)

    def product(self, batch: int, rows: int, columns: int, inner: int, itemsize: int) -> float:
        """Seconds of a library's product: its tiles in waves, also with the inner dimension split.

        Bytes are not counted, but for the partial results of a split.
        """
        if not batch * rows * columns * inner:
            return 0.0
        rate = self.ceilings.matmul if itemsize < 4 else self.processors * FP32_FLOPS * self.clock
        best = math.inf
        for down, across in TILES:
            tiles = batch * -(-rows // down) * -(-columns // across)
            for splits in range(1, min(SPLITS, max(inner // (8 * FILL), 1)) + 1):
                waves = -(-tiles * splits // self.processors)
                flops = 2 * down * across * (inner / splits + FILL) * self.processors
                partial = 2 * 4 * batch * rows * columns * splits if splits > 1 else 0
                best = min(best, waves * flops / rate + self.caching(partial))
        return best


KNOWN = {"h100": Gpu("NVIDIA H100 80GB HBM3", H100, 132), "h200": Gpu("NVIDIA H200", H200, 132)}
