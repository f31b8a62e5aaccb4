"""FLOPs of a step as the method specifies it, and the peaks of datasheets: model FLOPs utilisation (MFU).

2 per multiply-add of every matrix product, backward twice the forward, all rows of all blocks; what is
recomputed or padded does not count. `benchmarks.roofline` is the model by kernels and bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from poa.config import MethodConfig
from poa.network import VIEWS
from poa.subnets import Subnet

# Dense bf16 FLOP/s by the name of the device. Source: NVIDIA's datasheets.
DATASHEET_PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA B200": 2250e12,
}


def datasheet_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of the datasheet, where it is known."""
    return DATASHEET_PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def expected_masked(method: MethodConfig) -> float:
    """Patches under masks in the global crops of a micro-batch, on average."""
    crops, patches = VIEWS * method.batch_size, method.backbone.grid(method.crops.global_size) ** 2
    return int(crops * method.masks.probability) * patches * sum(method.masks.ratio) / 2


def micro_batch_flops(method: MethodConfig, elastic: Subnet, masked: float) -> float:
    """FLOPs of a micro-batch: the teacher's forward, both students forward and backward.

    On average `masked` patches of its global crops are under masks.
    """
    intact = method.backbone.space.intact
    return (
        _branch(method, intact, masked, student=False)
        + _branch(method, intact, masked, student=True)
        + _branch(method, elastic, masked, student=True)
    )


def workload(
    method: MethodConfig,
    drawn: Sequence[Sequence[Subnet]],
    masked: Sequence[float],
    shares: Sequence[Sequence[int]],
    images_per_s: float,
    peak: float | None,
    frozen: int = 0,
) -> dict[str, Any]:
    """What the elastic students of some steps were, and what that means for speed.

    Args:
        method: network, heads, crops.
        drawn: subnet of every micro-batch of every step.
        masked: patches under masks in a micro-batch of every step.
        shares: micro-batches of a step of every process.
        images_per_s: of all processes.
        peak: FLOP/s of a device, or None.
        frozen: FLOPs of a frozen teacher's forward of a global crop.

    Returns:
        `subnets` with their counts; `balance`, the mean FLOPs of processes over the largest, for which a step
        waits; `tflop_per_s` of a process and `mfu`, its share of the peak.
    """
    other = VIEWS * method.batch_size * frozen
    costs = [  # FLOPs of every process in every step
        [sum(micro_batch_flops(method, subnets[i], count) + other for i in share) for share in shares]
        for subnets, count in zip(drawn, masked, strict=True)
    ]
    images = sum(map(len, drawn)) * method.batch_size
    speed = images_per_s * sum(map(sum, costs)) / images / len(shares)
    return {
        "subnets": dict(Counter(str(subnet) for subnets in drawn for subnet in subnets)),
        "balance": sum(sum(cost) / len(shares) / max(cost) for cost in costs) / len(costs),
        "tflop_per_s": speed / 1e12,
        "mfu": speed / peak if peak else None,
    }


def _branch(method: MethodConfig, subnet: Subnet, masked: float, student: bool) -> float:
    backbone, crops, images = method.backbone, method.crops, method.batch_size
    groups = [(VIEWS * images, crops.global_size)]
    if student and crops.local_count:
        groups.append((crops.local_count * images, crops.local_size))
    rate = backbone.mean_drop_rate(subnet) if student else 0.0
    total = 0.0
    for count, size in groups:
        embedding = float(backbone.embedding_flops(subnet, size))
        blocks = backbone.flops(subnet, size) - embedding
        kept = max(int(count * (1 - rate)), 1)
        # The images need no gradient.
        total += (2 if student else 1) * count * embedding + (3 if student else 1) * kept * blocks
    head = method.head
    rows = sum(count for count, _ in groups) + masked
    sizes = head.sizes(backbone.feature_width(subnet))
    mlps = len(head.prototypes) * sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    products = 2.0 * rows * (mlps + head.bottleneck * sum(head.prototypes))
    return total + (3 if student else 1) * products
