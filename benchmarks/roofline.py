"""What a training step must cost: FLOPs and the fewest bytes of every kernel, and their time at the ceilings.

    python -m benchmarks roofline --preset vit-l16

    floor    sum over kernels of max(executed / matmul ceiling, bytes / copy ceiling), one after the other
    overlap  max(sum executed / matmul ceiling, sum bytes / copy ceiling)
    MFU      FLOPs of the algorithm as specified / (time * datasheet peak)

`flops` count the algorithm as specified: 2 per multiply-add of every product, backward twice the forward, all
rows of the last block. `executed` adds recomputation and tile padding and leaves out what need not be done.
`bytes` are those of a design in which nothing is read or written twice without need: fused epilogues, logits
never stored, one pass of the optimiser. Kernels that are not that far show a small share of the floor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from poa.backbones import ViTConfig
from poa.config import MethodConfig
from poa.data.masking import draw_masks
from poa.errors import InputError
from poa.flops import DATASHEET_PEAKS
from poa.multicrop import Groups
from poa.random import python_stream
from poa.subnets import Subnet
from poa.tribranch import VIEWS

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


STATED = "stated: 8192^3 bf16 product and device copy of an H200, published"
H200 = Ceilings(788e12, 4.3e12, DATASHEET_PEAKS["NVIDIA H200"], STATED)


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


@dataclass(frozen=True)
class Workload:
    """A step to be costed.

    Attributes:
        method: network, heads, crops.
        images: of a chunk.
        masked: patches under masks in its global crops.
        skip_dead_tokens: the last block leaves out what only unread tokens need.
        stream_bytes: of an element of the residual stream.
    """

    method: MethodConfig
    images: int
    masked: int
    skip_dead_tokens: bool = True
    stream_bytes: int = SINGLE

    @classmethod
    def of(cls, method: MethodConfig, images: int, **options: bool | int) -> Workload:
        """With the number of masked patches that the first step of a run draws."""
        side = method.backbone.grid(method.crops.global_size)
        dice = python_stream(method.seed, "masks", 0, 0)
        masks = draw_masks(VIEWS * images, (side, side), method.masks.probability, method.masks.ratio, dice)
        return cls(method, images, len(masks.indices), **options)  # type: ignore[arg-type]

    @property
    def vit(self) -> ViTConfig:
        """The backbone; the model knows the kernels of a ViT.

        Raises:
            InputError: another kind.
        """
        if not isinstance(self.method.backbone, ViTConfig):
            raise InputError(f"cost model: expected a backbone of kind vit, got {self.method.backbone.kind}")
        return self.method.backbone

    def groups(self, student: bool) -> Groups:
        """Crop groups of a branch."""
        crops, backbone = self.method.crops, self.vit
        views = [(VIEWS, crops.global_size)]
        if student and crops.local_count:
            views.append((crops.local_count, crops.local_size))
        return tuple((count * self.images, backbone.grid(size) ** 2 + 1) for count, size in views)

    def kept(self, student: bool) -> Groups:
        """What stochastic depth leaves of them in a half-block."""
        rate = self.vit.drop_path if student else 0.0
        return tuple((max(int(count * (1 - rate)), 1), length) for count, length in self.groups(student))

    def read_rows(self, student: bool) -> int:
        """Tokens whose features are read: class tokens and masked patches."""
        return sum(count for count, _ in self.groups(student)) + self.masked


def tokens(groups: Groups) -> int:
    return sum(count * length for count, length in groups)


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


def attention_flops(groups: Groups, width: int) -> float:
    """Of the forward: scores and their product with the values."""
    return sum(4.0 * count * length * length * width for count, length in groups)


def _attention_executed(groups: Groups, width: int) -> float:
    """With queries padded to tiles of 64 rows, keys to 16."""
    padded = [(count, -(-n // 64) * 64, -(-n // 16) * 16) for count, n in groups]
    return sum(4.0 * count * queries * keys * width for count, queries, keys in padded)


def block(work: Workload, part: str, width: int, *, last: bool = False) -> Iterator[Cost]:
    """One transformer block, forward and, for a student, backward."""
    student = part != "teacher"
    groups, hidden = work.kept(student), int(width * work.vit.mlp_ratio)
    rows, s = tokens(groups), work.stream_bytes
    share = 1 - work.vit.drop_path if student else 1.0
    needed = int(share * work.read_rows(student)) if last and work.skip_dead_tokens else rows
    whole, part_rows = HALF * rows * width, HALF * needed * width  # bytes of a half-precision activation
    into = needed * width * 2 * s  # residual read and written
    saved = needed / rows
    yield stream(part, "forward", "norm 1", rows * width * (s + HALF))
    for features, count in ((2, rows), (1, needed)) if last else ((3, rows),):
        yield product(part, "forward", "qkv", count, features * width, width)
    flops, executed = attention_flops(groups, width), _attention_executed(groups, width)
    yield Cost(part, "forward", "attention", flops, executed * saved, 2 * whole + 2 * part_rows, len(groups))
    yield product(part, "forward", "proj + residual", needed, width, width, stored=0, extra=into)
    yield stream(part, "forward", "norm 2", needed * width * (s + HALF))
    written = HALF * (2 if student else 1)
    yield product(part, "forward", "fc1 + gelu", needed, hidden, width, stored=written)
    yield product(part, "forward", "fc2 + residual", needed, width, hidden, stored=0, extra=into)
    if student:
        yield from _block_backward(work, part, width, groups, needed, last)


def _block_backward(
    work: Workload, part: str, width: int, groups: Groups, needed: int, last: bool
) -> Iterator[Cost]:
    hidden, rows, s = int(width * work.vit.mlp_ratio), tokens(groups), work.stream_bytes
    whole, part_rows = HALF * rows * width, HALF * needed * width
    accumulated = SINGLE * (1 if part == "intact" else 2)  # written once, or read and written

    def wgrad(name: str, count: float, out: float, inner: float) -> Cost:
        flops = 2.0 * count * out * inner
        moved = HALF * count * (out + inner) + accumulated * out * inner
        return Cost(part, "backward", f"{name} wgrad", flops, flops, moved)

    norm = width * (HALF + HALF + 2 * s)  # gradient, normalised row, stream gradient read and written
    yield product(
        part,
        "backward",
        "fc2 dgrad + gelu",
        needed,
        hidden,
        width,
        stored=0,
        extra=2 * HALF * needed * hidden,
    )
    yield wgrad("fc2", needed, width, hidden)
    yield product(part, "backward", "fc1 dgrad", needed, width, hidden)
    yield wgrad("fc1", needed, hidden, width)
    yield stream(part, "backward", "norm 2", needed * norm)
    yield product(part, "backward", "proj dgrad", needed, width, width)
    yield wgrad("proj", needed, width, width)
    flops = 2 * attention_flops(groups, width)
    executed = 2.5 * _attention_executed(groups, width) * needed / rows  # the scores are computed again
    yield Cost(part, "backward", "attention", flops, executed, 4 * whole + 4 * part_rows, len(groups))
    for features, count in ((2, rows), (1, needed)) if last else ((3, rows),):
        yield product(part, "backward", "qkv dgrad", count, width, features * width)
    yield wgrad("qkv", rows, 3 * width, width)
    yield stream(part, "backward", "norm 1", rows * norm)


def backbone(work: Workload, part: str, subnet: Subnet) -> Iterator[Cost]:
    """Embedding, blocks and last norm of a branch."""
    student, width, s = part != "teacher", subnet.width, work.stream_bytes
    patches = tokens(work.groups(student)) - sum(count for count, _ in work.groups(student))
    pixels = 3 * work.vit.patch_size**2
    yield product(part, "forward", "patch embedding", patches, width, pixels, stored=s)
    if student:
        flops = 2.0 * patches * width * pixels
        moved = patches * (pixels * HALF + width * s)
        yield Cost(part, "backward", "patch embedding wgrad", flops, flops, moved)
    for cost in block(work, part, width):
        yield cost.times(subnet.blocks[0] - 1)
    yield from block(work, part, width, last=True)
    rows = work.read_rows(student)
    yield stream(part, "forward", "last norm", rows * width * (s + HALF))
    if student:
        untouched = tokens(work.groups(student)) * width * s  # the gradient's zeros
        yield stream(part, "backward", "last norm", rows * width * (s + 2 * HALF) + untouched)


def heads(work: Workload, part: str, width: int) -> Iterator[Cost]:
    """Head MLPs, prototypes and losses; logits of students are never stored."""
    student, head = part != "teacher", work.method.head
    rows, count = work.read_rows(student), len(head.prototypes)
    sizes = [width] + [head.hidden] * (head.layers - 1) + [head.bottleneck]
    for inner, out in zip(sizes, sizes[1:], strict=False):
        stored = HALF * (2 if student else 1)
        yield product(part, "forward", "head MLP", rows, out, inner, count=count, stored=stored)
        if student:
            activation = count * 2 * HALF * rows * inner
            yield product(part, "backward", "head MLP dgrad", rows, inner, out, count=count, extra=activation)
            flops = 2.0 * count * rows * out * inner
            moved = count * (HALF * rows * (out + inner) + SINGLE * out * inner)
            yield Cost(part, "backward", "head MLP wgrad", flops, flops, moved, count)
    prototypes = sum(head.prototypes)
    flops = 2.0 * rows * head.bottleneck * prototypes
    weights, logits = HALF * prototypes * head.bottleneck, HALF * rows * prototypes
    if not student:
        yield Cost(part, "forward", "prototypes", flops, flops, weights + logits, count)
        yield stream(part, "forward", "Sinkhorn", 4 * logits, 4 * count)
        return
    shared = HALF * work.read_rows(student=False) * prototypes / 2  # both students read the teacher's at once
    yield Cost(part, "forward", "prototypes + losses", flops, flops, weights + shared, count)
    yield Cost(part, "backward", "losses, logits again", 0.0, flops, weights + shared + logits, count)
    moved = 2 * logits + 2 * weights + SINGLE * prototypes * head.bottleneck
    yield Cost(part, "backward", "prototypes dgrad, wgrad", 2 * flops, 2 * flops, moved, 2 * count)


def parameters(method: MethodConfig) -> int:
    """Of the intact network with its heads."""
    head, width = method.head, method.backbone.feature_width(method.backbone.space.intact)
    sizes = [width] + [head.hidden] * (head.layers - 1) + [head.bottleneck]
    mlp = sum(out * (inner + 1) for inner, out in zip(sizes, sizes[1:], strict=False))
    prototypes = sum(head.prototypes) * (head.bottleneck + 1)
    return method.backbone.parameters(method.backbone.space.intact) + len(head.prototypes) * mlp + prototypes


def update(method: MethodConfig) -> Iterator[Cost]:
    """Gradient norm, then clip, AdamW, moving average and half-precision copies in one pass."""
    count = parameters(method)
    yield stream("update", "update", "gradient norm", SINGLE * count, 2)
    read, written, copies = 5 * SINGLE, 4 * SINGLE, 2 * HALF  # w g m v teacher; w m v teacher; both rounded
    yield stream("update", "update", "AdamW, average, copies", (read + written + copies) * count, 2)


def step(work: Workload, elastic: Subnet) -> list[Cost]:
    """All kernels of a step with one elastic subnet."""
    intact = work.method.backbone.space.intact
    return [
        *backbone(work, "teacher", intact), *heads(work, "teacher", intact.width),
        *backbone(work, "intact", intact), *heads(work, "intact", intact.width),
        *backbone(work, "elastic", elastic), *heads(work, "elastic", elastic.width),
        *update(work.method),
    ]  # fmt: skip


def mean_step(work: Workload) -> list[Cost]:
    """The expected step over the subnets as the method draws them: each one's kernels times its share."""
    draws = work.method.backbone.space.round_of_draws()
    costs = [cost for cost in step(work, draws[0]) if cost.part != "elastic"]
    for subnet in sorted(set(draws)):
        share = draws.count(subnet) / len(draws)
        elastic = (*backbone(work, "elastic", subnet), *heads(work, "elastic", subnet.width))
        costs += [cost.times(share) for cost in elastic]
    return costs


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


def report(work: Workload, ceilings: Ceilings) -> str:
    """Tables of the expected step: by kernel, by branch, and the bounds."""
    costs, lines = mean_step(work), [f"ceilings: {ceilings.source}"]
    kernels: dict[tuple[str, str, str], list[Cost]] = {}
    for cost in costs:
        kernels.setdefault((cost.part, cost.phase, cost.kernel), []).append(cost)
    lines.append(f"{'':8} {'':9} {'kernel':26}{'GFLOP':>10}{'GB':>8}{'floor ms':>10}{'launches':>9}")
    for (part, phase, kernel), several in kernels.items():
        sums = Summary.of(several, ceilings)
        lines.append(
            f"{part:8} {phase:9} {kernel:26}{sums.flops / 1e9:10.0f}{sums.bytes / 1e9:8.2f}"
            f"{sums.floor * 1e3:10.2f}{sums.launches:9.0f}"
        )
    total = Summary.of(costs, ceilings)
    lines.append(
        f"\n{total.flops / 1e12:.2f} TFLOP, {total.bytes / 1e9:.0f} GB, {total.launches:.0f} launches"
    )
    for name, seconds in (("floor", total.floor), ("overlap bound", total.overlap)):
        mfu = total.mfu(seconds, ceilings)
        lines.append(
            f"{name:14} {seconds * 1e3:7.1f} ms a step, {work.images / seconds:6.1f} images/s"
            + (f", MFU {mfu:.1%}" if mfu else "")
        )
    return "\n".join(lines)
