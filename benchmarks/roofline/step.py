"""All kernels of a step: three branches with their heads, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from benchmarks.roofline.costs import HALF, SINGLE, Ceilings, Cost, Summary, product, stream
from benchmarks.roofline.workload import Workload
from poa.config import MethodConfig
from poa.subnets import Subnet


def heads(work: Workload, part: str, width: int) -> Iterator[Cost]:
    """Head MLPs, prototypes and losses; logits of students are never stored."""
    student, head = part != "teacher", work.method.head
    rows, count = work.read_rows(student), len(head.prototypes)
    sizes = head.sizes(width)
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
    backbone, intact = method.backbone, method.backbone.space.intact
    return backbone.parameters(intact) + method.head.parameters(backbone.feature_width(intact))


def update(method: MethodConfig) -> Iterator[Cost]:
    """Gradient norm, then clip, AdamW, moving average and half-precision copies in one pass."""
    count = parameters(method)
    yield stream("update", "update", "gradient norm", SINGLE * count, 2)
    read, written, copies = 5 * SINGLE, 4 * SINGLE, 2 * HALF  # w g m v teacher; w m v teacher; both rounded
    yield stream("update", "update", "AdamW, average, copies", (read + written + copies) * count, 2)


def branch(work: Workload, part: str, subnet: Subnet) -> Iterator[Cost]:
    """The teacher or a student: backbone and heads."""
    config = work.method.backbone
    kernels = import_module(f"benchmarks.roofline.{config.kind}")  # a file for each kind of backbone
    yield from kernels.backbone(config, work, part, subnet)
    yield from heads(work, part, config.feature_width(subnet))


def step(work: Workload, elastic: Subnet) -> list[Cost]:
    """All kernels of a step with one elastic subnet."""
    intact = work.method.backbone.space.intact
    return [
        *branch(work, "teacher", intact),
        *branch(work, "intact", intact),
        *branch(work, "elastic", elastic),
        *update(work.method),
    ]


def mean_step(work: Workload) -> list[Cost]:
    """The expected step over the subnets as the method draws them: each one's kernels times its share."""
    draws = work.method.backbone.space.round_of_draws()
    costs = [cost for cost in step(work, draws[0]) if cost.part != "elastic"]
    for subnet in sorted(set(draws)):
        share = draws.count(subnet) / len(draws)
        costs += [cost.times(share) for cost in branch(work, "elastic", subnet)]
    return costs


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
