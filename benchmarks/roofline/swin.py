"""The kernels of a Swin transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.roofline.costs import HALF, Cost, product, stream
from benchmarks.roofline.transformer import Attention, Block, weight_gradient
from benchmarks.roofline.workload import Workload
from poa.backbones import SwinConfig
from poa.subnets import Subnet

Maps = Sequence[tuple[int, int]]
"""`(count, side)` of each crop group."""

TILE = 64  # rows and columns of the tile of a window of 49 or 64 positions


def positions(maps: Maps) -> int:
    return sum(count * side**2 for count, side in maps)


def attention(window: int, maps: Maps, width: int, share: float = 1.0) -> Attention:
    """Windows at the edges of a map are padded, and each to a tile; of this share of the maps."""
    windows = share * sum(count * (-(-side // window)) ** 2 for count, side in maps)
    products = 4.0 * windows * width
    return Attention(products * window**4, products * TILE**2, len(maps), keeps_output=False)


def backbone(config: SwinConfig, work: Workload, part: str, subnet: Subnet) -> Iterator[Cost]:
    """Embedding, blocks, mergings and last norm of a branch."""
    student, width, s = part != "teacher", subnet.width, work.stream_bytes
    crops = work.crops(student)
    sides = [config.sides(size) for _, size in crops]
    rates, stages = iter(config.active_drop_rates(subnet)), len(subnet.blocks)
    yield from _embedding(config, work, part, width)
    for stage, depth in enumerate(subnet.blocks):
        maps = [(count, side[stage]) for (count, _), side in zip(crops, sides, strict=True)]
        rows, hidden = positions(maps), int(width * config.mlp_ratio)
        for _ in range(depth):
            share = 1 - next(rates) if student else 1.0
            within = attention(config.window, maps, width, share)
            yield from Block(part, width, hidden, share * rows, share * rows, within, s).costs()
        if stage < stages - 1:
            after = [(count, side[stage + 1]) for (count, _), side in zip(crops, sides, strict=True)]
            yield from _merging(part, width, positions(after), s)
            width *= 2
    yield stream(part, "forward", "last norm", rows * width * (s + HALF))
    if student:
        yield stream(part, "backward", "last norm", rows * width * (2 * s + HALF))


def _embedding(config: SwinConfig, work: Workload, part: str, width: int) -> Iterator[Cost]:
    """All channels are computed and normalised; only the first ones are used by the blocks."""
    student, s, out, pixels = part != "teacher", work.stream_bytes, config.embedding, 3 * config.patch_size**2
    patches = positions([(count, config.sides(size)[0]) for count, size in work.crops(student)])
    yield product(part, "forward", "patch embedding", patches, out, pixels)
    yield stream(part, "forward", "embedding norm", patches * (out * HALF + width * s))
    if student:
        yield stream(part, "backward", "embedding norm", patches * (width * s + 2 * out * HALF))
        flops, moved = 2.0 * patches * out * pixels, HALF * patches * (pixels + out)
        yield Cost(part, "backward", "patch embedding wgrad", flops, flops, moved)


def _merging(part: str, width: int, rows: int, s: int) -> Iterator[Cost]:
    """Norm of four neighbours, which it gathers, and the reduction to twice the width."""
    merged = 4 * width
    yield stream(part, "forward", "merging norm", rows * merged * (s + HALF))
    yield product(part, "forward", "merging", rows, 2 * width, merged, stored=s)
    if part != "teacher":
        yield product(part, "backward", "merging dgrad", rows, merged, 2 * width)
        yield weight_gradient(part, "merging", rows, 2 * width, merged)
        yield stream(part, "backward", "merging norm", rows * merged * (2 * HALF + s))
