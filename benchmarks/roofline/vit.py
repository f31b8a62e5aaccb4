"""The kernels of a ViT."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.roofline.costs import HALF, Cost, product, stream
from benchmarks.roofline.transformer import Attention, Block
from benchmarks.roofline.workload import Workload
from poa.backbones import ViTConfig
from poa.multicrop import Groups
from poa.subnets import Subnet


def tokens(groups: Groups) -> int:
    return sum(count * length for count, length in groups)


def attention_flops(groups: Groups, width: int) -> float:
    """Of the forward: scores and their product with the values."""
    return sum(4.0 * count * length * length * width for count, length in groups)


def _attention(groups: Groups, width: int) -> Attention:
    """Queries are padded to tiles of 64 rows, keys to 16."""
    padded = [(count, -(-n // 64) * 64, -(-n // 16) * 16) for count, n in groups]
    executed = sum(4.0 * count * queries * keys * width for count, queries, keys in padded)
    return Attention(attention_flops(groups, width), executed, len(groups), keeps_output=True)


def groups(config: ViTConfig, work: Workload, student: bool) -> Groups:
    """Crop groups of a branch: patches, the class token and registers."""
    return tuple((count, config.grid(size) ** 2 + config.prefix) for count, size in work.crops(student))


def kept(config: ViTConfig, work: Workload, student: bool) -> Groups:
    """What stochastic depth leaves of them in a half-block."""
    rate = config.drop_path if student else 0.0
    return tuple((max(int(count * (1 - rate)), 1), length) for count, length in groups(config, work, student))


def block(config: ViTConfig, work: Workload, part: str, width: int, *, last: bool = False) -> Block:
    student = part != "teacher"
    active = kept(config, work, student)
    rows, share = tokens(active), 1 - config.drop_path if student else 1.0
    needed = int(share * work.read_rows(student)) if last and work.skip_dead_tokens else rows
    hidden = int(width * config.mlp_ratio)
    return Block(part, width, hidden, rows, needed, _attention(active, width), work.stream_bytes)


def backbone(config: ViTConfig, work: Workload, part: str, subnet: Subnet) -> Iterator[Cost]:
    """Embedding, blocks and last norm of a branch."""
    student, width, s = part != "teacher", subnet.width, work.stream_bytes
    all_groups = groups(config, work, student)
    patches = tokens(all_groups) - config.prefix * sum(count for count, _ in all_groups)
    pixels = 3 * config.patch_size**2
    yield product(part, "forward", "patch embedding", patches, width, pixels, stored=s)
    if student:
        flops = 2.0 * patches * width * pixels
        moved = patches * (pixels * HALF + width * s)
        yield Cost(part, "backward", "patch embedding wgrad", flops, flops, moved)
    for cost in block(config, work, part, width).costs():
        yield cost.times(subnet.blocks[0] - 1)
    yield from block(config, work, part, width, last=True).costs()
    rows = work.read_rows(student)
    yield stream(part, "forward", "last norm", rows * width * (s + HALF))
    if student:
        untouched = tokens(all_groups) * width * s  # the gradient's zeros
        yield stream(part, "backward", "last norm", rows * width * (s + 2 * HALF) + untouched)
