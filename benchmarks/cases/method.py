"""Losses, targets and the update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels as ek
from benchmarks.cases.common import Groups, Sizes, draw, providers_of
from benchmarks.failures import Unavailable
from benchmarks.harness import Problem, Provider
from benchmarks.peers import naive
from benchmarks.peers import optimizer as optimizer_peers
from poa.network import Network
from poa.presets import preset


def prototype_losses(device: torch.device, sizes: Sizes, groups: Groups, count: int) -> Problem:
    """Masked patches of both students; the naive way keeps every logit and target.

    Features and prototypes are fp32, and are rounded for their products.
    """
    rows, dim = sizes.masked, sizes.bottleneck
    dtype = torch.float16 if sizes.dtype == torch.bfloat16 else sizes.dtype
    leaves = {
        "x1": F.normalize(draw(device, torch.float32, rows, dim), dim=1),
        "x2": F.normalize(draw(device, torch.float32, rows, dim, seed=1), dim=1),
        "weight": F.normalize(draw(device, torch.float32, count, dim, seed=2), dim=1),
    }
    teacher = draw(device, torch.float32, rows, count, seed=3).tanh().to(dtype)
    scale = draw(device, torch.float32, count, seed=4)
    own = torch.arange(rows, device=device)
    index = torch.stack([own, torch.full_like(own, -1)], dim=1)

    def ours(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        losses = ek.prototype_cross_entropy(
            [x1, x2], weight, teacher, scale, index, teacher_temperature=0.05, operands=dtype
        )
        return torch.stack(losses)

    def plain(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x1.dtype, torch.float32)
        target = torch.softmax(teacher.to(wide) / 0.05 + scale, dim=-1)
        narrow = dtype if wide == torch.float32 else wide  # the truth is made of float64
        logits = (F.linear(x.to(narrow), weight.to(narrow)).to(wide) for x in (x1, x2))
        s1, s2 = (torch.log_softmax(s / 0.1, dim=-1) for s in logits)
        return torch.stack(
            [-(q * s).sum(-1) for q, s in ((target, s1), (target, s2), (s1.detach().exp(), s2))]
        )

    flops, size = 4.0 * rows * count * dim, dtype.itemsize
    forward = 4.0 * (2 * rows * dim + count * dim) + size * rows * count
    moved = {"fwd": forward, "bwd": 2.0 * forward + 4 * size * rows * count, "fwd+bwd": 0.0}
    moved["fwd+bwd"] = moved["fwd"] + moved["bwd"]
    shape = f"2x{rows} {dim}x{count}, {str(dtype).removeprefix('torch.')} operands"
    providers = providers_of(ours, plain, liger=_liger_losses)
    return Problem("prototype_losses", shape, leaves, providers, flops, moved)


def _liger_losses() -> Provider:
    """The nearest to be had, `LigerFusedLinearJSD`, computes something else."""
    raise Unavailable("its fused_linear_jsd has one temperature and one sum over rows, which weigh the same")


def sinkhorn(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Three iterations; the naive way keeps the assignments in fp32 and normalises them in place."""
    dtype = torch.float16 if sizes.dtype == torch.bfloat16 else sizes.dtype
    counts = preset(sizes.preset).method.head.prototypes
    shapes = [(rows, count) for rows in (2 * sizes.images, sizes.masked) for count in counts]
    leaves = {
        f"logits_{n}": draw(device, torch.float32, *shape, seed=n).tanh().to(dtype)
        for n, shape in enumerate(shapes)
    }

    def ours(**logits: Tensor) -> Tensor:
        return torch.cat(ek.sinkhorn_scaling(list(logits.values()), 0.05))

    def plain(**logits: Tensor) -> Tensor:
        return torch.cat([naive.sinkhorn(t, 0.05) for t in logits.values()])

    elements = sum(rows * count for rows, count in shapes)
    moved = {"fwd": 5.0 * dtype.itemsize * elements}  # every row sum and column sum reads all of them
    shape = f"{'+'.join(str(rows) for rows in (2 * sizes.images, sizes.masked))} {'+'.join(map(str, counts))}"
    return Problem("sinkhorn", shape, leaves, providers_of(ours, plain), 0.0, moved, trains=False)


def optimizer(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    method = preset(sizes.preset).method
    with torch.device("meta"):
        counts = [p.numel() for p in Network(method.backbone, method.head).parameters()]
    padded = [-(-count // 4) * 4 for count in counts]  # tensors of their own begin at multiples of 16 bytes
    names = ("params", "grads", "averages")
    leaves = {name: draw(device, torch.float32, sum(padded), seed=n) for n, name in enumerate(names)}
    # Gradients twice; weights, moments and average read and written; two copies written.
    moved = {"fwd": (10.0 * torch.float32.itemsize + 2 * torch.bfloat16.itemsize) * sum(padded)}
    shape = f"{sum(counts)} in {len(counts)}"
    return Problem("optimizer", shape, leaves, optimizer_peers.providers(padded), 0.0, moved, trains=False)
