"""The time of a training step's kernels, predicted from their compiled code, without a GPU.

    python -m benchmarks predict --preset vit-l16 --gpu h200 --subnet 640x18
    python -m benchmarks predict --preset vit-l16 --gpu h200 --subnet 640x18 --persistent 2

Launches are those of a whole step on meta tensors, kernels those that Triton compiles for sm_90. A kernel
takes the most of: its blocks in waves, each simulated from machine code (`machine.py`); its bytes at the
GPU's ceiling; its traffic with L2. Loops run as often as the launch's arguments say (`programs.py`); of
persistent programs, those that share a processor with the first take the longest. Products of libraries take
whole waves of tiles at the matmul ceiling, other operators their bytes. Kernels run one after the other, and
the host is not waited for.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.assembly import Compiled
from benchmarks.prediction.costs import Cost, kernel_cost, operator_cost
from benchmarks.prediction.gpus import KNOWN, Gpu
from benchmarks.prediction.measured import Measured
from benchmarks.prediction.trace import record
from poa.config import Config
from poa.subnets import Subnet

ERROR = 0.25
RESOURCES = ("tensor", "mufu", "fma", "alu", "lsu", "issue", "latency", "memory", "L2")
LEAST = 5e-5  # seconds of a step, of a kernel that has a line


def step_costs(config: Config, elastic: Subnet, gpus: Sequence[Gpu], persistent: int = 0) -> list[list[Cost]]:
    """Costs of a step on each GPU, by kernel and form, and by operator, the largest first."""
    kernels, operators = record(config, elastic, persistent)
    binaries = list({kernel.binary: None for kernel in kernels})
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        compiled = dict(zip(binaries, pool.map(Compiled.of, binaries, chunksize=2), strict=True))
    counts = Counter(kernels).items()
    return [
        _by_form(
            [
                *(kernel_cost(kernel, count, compiled[kernel.binary], gpu) for kernel, count in counts),
                *(operator_cost(operator, gpu) for operator in operators),
            ]
        )
        for gpu in gpus
    ]


def _by_form(costs: Sequence[Cost]) -> list[Cost]:
    """Sums of those of one name and form."""
    sums: dict[tuple[str, str], Cost] = {}
    for cost in costs:
        sums.setdefault((cost.name, cost.form), Cost(cost.name, cost.form)).add(cost)
    return sorted(sums.values(), key=lambda cost: -cost.seconds)


def run(config: Config, elastic: Subnet, gpu: str, persistent: int = 0) -> tuple[list[str], dict[str, Any]]:
    """Predict a step on one of `gpus.KNOWN`, perhaps with `persistent` programs, so many a processor.

    Returns:
        Lines of a table, and a summary: milliseconds of a step, and images/s.
    """
    (costs,), method = step_costs(config, elastic, [KNOWN[gpu]], persistent), config.method
    return report(costs, KNOWN[gpu], str(method.backbone.space.intact), str(elastic), method.batch_size)


def report(
    costs: Sequence[Cost], gpu: Gpu, intact: str, elastic: str, images: int
) -> tuple[list[str], dict[str, Any]]:
    """Lines and summary, beside what was measured of such a step."""
    measured = Measured.of(gpu.name, f"{intact} {images} images", elastic)
    total, launches = sum(cost.seconds for cost in costs), sum(cost.launches for cost in costs)
    shown = [cost for cost in costs if cost.seconds >= LEAST]
    rest = total - sum(cost.seconds for cost in shown)
    lines = [
        f"a model of an {gpu.name}, not a measurement: expect it within {ERROR:.0%}; ms of a step",
        f"{'ms':>8}{'measured':>10}{'launches':>9}{'waves':>7}{'blocks':>7}{'bound':>9} "
        + "".join(f"{name:>8}" for name in RESOURCES)
        + "  kernel",
        *(_line(cost, measured.kernels.get(cost.name)) for cost in shown),
        f"{rest * 1e3:8.2f}  in {launches - sum(cost.launches for cost in shown):,} launches of others",
        f"{total * 1e3:8.2f}  in {launches:,} launches: {images / total:.1f} images/s; "
        + (f"measured {measured.images_per_s:.1f}" if measured.images_per_s else "not measured"),
    ]
    return lines, {"step_ms": round(total * 1e3, 1), "images_per_s": round(images / total, 1)}


def _line(cost: Cost, measured: float | None) -> str:
    parts = "".join(f"{cost.resources.get(name, 0.0) * 1e3:8.2f}" for name in RESOURCES)
    return (
        f"{cost.seconds * 1e3:8.2f}{'' if measured is None else f'{measured:.2f}':>10}{cost.launches:9,}"
        f"{cost.waves:7.1f}{cost.blocks:7}{cost.bound:>9} {parts}  {cost.name} {cost.form}"
        + " (trips of loops are guesses)"
        * bool(cost.guessed)
    )
