"""The kernels of a ResNet with group norm; maps are in half precision."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.roofline.costs import HALF, SINGLE, Cost, stream
from benchmarks.roofline.workload import Workload
from poa.backbones import ResNetConfig
from poa.subnets import Subnet


def backbone(config: ResNetConfig, work: Workload, part: str, subnet: Subnet) -> Iterator[Cost]:
    """Stem and blocks of a branch; crop groups run one after the other."""
    for count, size in work.crops(part != "teacher"):
        yield from _stem(config, part, count, size)
        sides = config.sides(size)
        entry, before = config.base_width, sides[0]
        for stage, depth in enumerate(subnet.blocks):
            middle, out, side = subnet.width * 2**stage, config.outputs(stage), sides[stage]
            rows = count * side**2
            yield from block(part, count * before**2, rows, entry, middle, out, projected=True)
            for cost in block(part, rows, rows, out, middle, out, projected=False):
                yield cost.times(depth - 1)
            entry, before = out, side


def _stem(config: ResNetConfig, part: str, count: int, size: int) -> Iterator[Cost]:
    """A convolution of the images, which need no gradient, norm and pooling."""
    out, rows, pooled = config.base_width, count * (-(-size // 2)) ** 2, count * config.sides(size)[0] ** 2
    flops, moved = 2.0 * rows * out * 3 * 7**2, HALF * (3 * count * size**2 + rows * out)
    yield Cost(part, "forward", "stem conv", flops, flops, moved)
    yield norm(part, "stem norm", rows * out, residual=False)
    yield stream(part, "forward", "pooling", HALF * (rows + pooled) * out)
    if part != "teacher":
        yield stream(part, "backward", "pooling", HALF * (rows + 2 * pooled) * out)
        yield norm_backward(part, "stem norm", rows * out, residual=False)
        yield Cost(part, "backward", "stem conv wgrad", flops, flops, moved)


def block(
    part: str, rows_in: int, rows: int, entry: int, middle: int, out: int, *, projected: bool
) -> Iterator[Cost]:
    """One bottleneck: `rows_in` positions of `entry` channels become `rows` of `out`."""
    yield from _convolution(part, "conv1", rows_in, rows_in, entry, middle, 1)
    yield from _normalised(part, "norm 1", rows_in * middle, residual=False)
    yield from _convolution(part, "conv2", rows_in, rows, middle, middle, 9)
    yield from _normalised(part, "norm 2", rows * middle, residual=False)
    yield from _convolution(part, "conv3", rows, rows, middle, out, 1)
    if projected:
        yield from _convolution(part, "shortcut conv", rows, rows, entry, out, 1)
        yield from _normalised(part, "shortcut norm", rows * out, residual=False)
    yield from _normalised(part, "norm 3", rows * out, residual=True)


def _convolution(
    part: str, name: str, rows_in: int, rows: int, inner: int, out: int, taps: int
) -> Iterator[Cost]:
    """Of `taps` positions each; the gradient of its weight is accumulated in fp32."""
    flops, weight = 2.0 * rows * inner * out * taps, inner * out * taps
    maps = HALF * (rows_in * inner + rows * out)
    yield Cost(part, "forward", name, flops, flops, maps + HALF * weight)
    if part != "teacher":
        accumulated = SINGLE * weight * (1 if part == "intact" else 2)
        yield Cost(part, "backward", f"{name} dgrad", flops, flops, maps + HALF * weight)
        yield Cost(part, "backward", f"{name} wgrad", flops, flops, maps + accumulated)


def _normalised(part: str, name: str, elements: int, *, residual: bool) -> Iterator[Cost]:
    yield norm(part, name, elements, residual=residual)
    if part != "teacher":
        yield norm_backward(part, name, elements, residual=residual)


def norm(part: str, name: str, elements: int, *, residual: bool) -> Cost:
    """A sample's group stays in the cache between its statistics and its result."""
    return stream(part, "forward", name, HALF * elements * (3 if residual else 2))


def norm_backward(part: str, name: str, elements: int, *, residual: bool) -> Cost:
    """The gradient, input and output are read; that of the input, and of the residual, written."""
    return stream(part, "backward", name, HALF * elements * (5 if residual else 4))
