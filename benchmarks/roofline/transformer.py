"""A pre-norm transformer block, whatever its attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.roofline.costs import HALF, SINGLE, Cost, product, stream


@dataclass(frozen=True)
class Attention:
    """The forward of a block's attention, with FLOPs as of `Cost`, its kernels' launches, and whether it
    keeps its output for backward."""

    flops: float
    executed: float
    launches: int
    keeps_output: bool


@dataclass(frozen=True)
class Block:
    """A block of a branch.

    Attributes:
        part: the branch.
        width, hidden: of the block and of its MLP.
        rows: tokens that take part.
        needed: of them, those whose result is read.
        attention: its attention.
        stream_bytes: of an element of the residual stream.
    """

    part: str
    width: int
    hidden: int
    rows: float
    needed: float
    attention: Attention
    stream_bytes: int

    @property
    def _projections(self) -> tuple[tuple[int, float], ...]:
        """Widths of products with tokens, and how many: q may be for the needed ones alone."""
        return ((3, self.rows),) if self.needed == self.rows else ((2, self.rows), (1, self.needed))

    def costs(self) -> Iterator[Cost]:
        """Forward and, for a student, backward."""
        yield from self.forward()
        if self.part != "teacher":
            yield from self.backward()

    def forward(self) -> Iterator[Cost]:
        rows, needed, width, hidden, s = self.rows, self.needed, self.width, self.hidden, self.stream_bytes
        whole, part_rows = HALF * rows * width, HALF * needed * width  # bytes of half-precision activations
        gemm, norm = (partial(kind, self.part, "forward") for kind in (product, stream))
        into = needed * width * 2 * s  # residual read and written
        yield norm("norm 1", rows * width * (s + HALF))
        for features, count in self._projections:
            yield gemm("qkv", count, features * width, width)
        attention, moved = self.attention, 2 * whole + 2 * part_rows
        executed = attention.executed * needed / rows
        yield Cost(
            self.part, "forward", "attention", attention.flops, executed, moved, self.attention.launches
        )
        yield gemm("proj + residual", needed, width, width, stored=0, extra=into)
        yield norm("norm 2", needed * width * (s + HALF))
        written = HALF * (1 if self.part == "teacher" else 2)
        yield gemm("fc1 + gelu", needed, hidden, width, stored=written)
        yield gemm("fc2 + residual", needed, width, hidden, stored=0, extra=into)

    def backward(self) -> Iterator[Cost]:
        rows, needed, width, hidden, s = self.rows, self.needed, self.width, self.hidden, self.stream_bytes
        whole, part_rows = HALF * rows * width, HALF * needed * width
        gemm, norm = (partial(kind, self.part, "backward") for kind in (product, stream))
        wgrad = partial(weight_gradient, self.part)
        row = width * (HALF + HALF + 2 * s)  # gradient, normalised row, stream gradient read and written
        activation = 2 * HALF * needed * hidden
        yield gemm("fc2 dgrad + gelu", needed, hidden, width, stored=0, extra=activation)
        yield wgrad("fc2", needed, width, hidden)
        yield gemm("fc1 dgrad", needed, width, hidden)
        yield wgrad("fc1", needed, hidden, width)
        yield norm("norm 2", needed * row)
        yield gemm("proj dgrad", needed, width, width)
        yield wgrad("proj", needed, width, width)
        attention = self.attention
        executed = 2.5 * attention.executed * needed / rows  # the scores are computed again
        moved = 4 * whole + (4 if attention.keeps_output else 3) * part_rows
        yield Cost(
            self.part, "backward", "attention", 2 * attention.flops, executed, moved, attention.launches
        )
        for features, count in self._projections:
            yield gemm("qkv dgrad", count, width, features * width)
        yield wgrad("qkv", rows, 3 * width, width)
        yield norm("norm 1", rows * row)


def weight_gradient(part: str, name: str, rows: float, out: int, inner: int) -> Cost:
    """The gradient in fp32 of a weight `[out, inner]`: the elastic student's is added to the intact one's."""
    flops, accumulated = 2.0 * rows * out * inner, SINGLE * (1 if part == "intact" else 2)
    moved = HALF * rows * (out + inner) + accumulated * out * inner
    return Cost(part, "backward", f"{name} wgrad", flops, flops, moved)
