"""Layers of other elastic networks and of newer ViTs, beside naive slicing, padding and other kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels as ek
from benchmarks.cases.common import (
    Groups,
    Sizes,
    bytes_of,
    draw,
    leaves_of,
    of_module,
    providers_of,
    shape_of,
)
from benchmarks.failures import Unavailable
from benchmarks.harness import Problem, Provider
from benchmarks.peers import designs as peers
from benchmarks.peers import naive
from benchmarks.roofline.vit import attention_flops, tokens

EPS = 1e-6


def rms_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {"x": draw(device, dtype, rows, width), "weight": draw(device, dtype, sizes.largest, seed=1)}

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ek.elastic_rms_norm(x, weight, EPS)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight[:width], EPS)

    others = {"liger": lambda: peers.liger_rms_norm(EPS, device), "quack": lambda: peers.quack(EPS, device)}
    moved = bytes_of(dtype, 2 * rows * width, 3 * rows * width)
    return Problem(
        "rms_norm", shape_of(groups, width), leaves, providers_of(ours, plain, **others), 0.0, moved
    )


def swiglu(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Two thirds of the hidden units of a GELU, as usual."""
    rows, dtype, most = tokens(groups), sizes.dtype, 8 * sizes.largest // 3
    hidden = ek.elastic_hidden_features(width, sizes.largest, most)
    leaves = {
        "x": draw(device, dtype, rows, width),
        "fc1": draw(device, dtype, 2 * most, sizes.largest, seed=1, scale=sizes.largest**-0.5),
        "fc2": draw(device, dtype, sizes.largest, most, seed=2, scale=most**-0.5),
    }

    def ours(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return ek.elastic_swiglu(x, fc1, None, fc2, None, scale=None)

    def sliced(gate: Callable[[Tensor, Tensor], Tensor]) -> Provider:
        def mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
            g, u = (F.linear(x, half[:hidden, :width]) for half in fc1.chunk(2))
            return F.linear(gate(g, u), fc2[:width, :hidden])

        return mlp

    others = {"liger": lambda: sliced(peers.liger_gate(device))}
    providers = providers_of(ours, sliced(lambda g, u: F.silu(g) * u), **others)
    weights, flops = 3 * width * hidden, 6.0 * rows * width * hidden
    # Forward: x, gate and units twice, the activation twice, y; backward about twice.
    backward = rows * (4 * width + 13 * hidden) + weights
    moved = bytes_of(dtype, rows * (2 * width + 6 * hidden) + weights, backward)
    return Problem("swiglu", shape_of(groups, width, hidden), leaves, providers, flops, moved)


def qk_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """RMSNorm of queries and keys of each head, and a rotary embedding."""
    rows, dtype, dim = tokens(groups), sizes.dtype, sizes.head_dim
    leaves = {
        "qkv": draw(device, dtype, rows, 3, width // dim, dim),
        "weight": draw(device, dtype, 2, dim, seed=1),
    }
    angles = draw(device, torch.float32, rows, dim // 2, seed=2).repeat_interleave(2, 1)
    rotary = ek.Rotary(angles.sin(), angles.cos())

    def ours(qkv: Tensor, weight: Tensor) -> Tensor:
        return ek.qk_norm(qkv, weight, None, EPS, rotary=rotary)

    def turned(norm: Callable[[Tensor, Tensor], Tensor]) -> Provider:
        def provider(qkv: Tensor, weight: Tensor) -> Tensor:
            q, k = (norm(qkv[:, part], weight[part]) for part in range(2))
            return rotary.turn(torch.stack([q, k, qkv[:, 2]], 1))

        return provider

    others = {"liger": lambda: turned(peers.liger_rms_norm(EPS, device))}
    plain = turned(lambda x, weight: F.rms_norm(x, (dim,), weight, EPS))
    moved = bytes_of(dtype, 6 * rows * width, 8 * rows * width)
    return Problem(
        "qk_norm", shape_of(groups, width), leaves, providers_of(ours, plain, **others), 0.0, moved
    )


def nested_mlp(device: torch.device, sizes: Sizes, groups: Groups, hidden: int) -> Problem:
    """MatFormer: the whole width, `hidden` units of four times as many, no offset scale."""
    rows, dtype, width = tokens(groups), sizes.dtype, sizes.largest
    leaves = {
        "x": draw(device, dtype, rows, width),
        "fc1": draw(device, dtype, 4 * width, width, seed=1, scale=width**-0.5),
        "fc2": draw(device, dtype, width, 4 * width, seed=2, scale=(4 * width) ** -0.5),
    }

    def ours(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return ek.elastic_mlp(x, fc1, None, fc2, None, hidden=hidden, scale=None)

    def plain(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, fc1[:hidden])), fc2[:, :hidden])

    weights = 2 * width * hidden
    backward = rows * (4 * width + 6 * hidden) + weights
    moved = bytes_of(dtype, rows * (2 * width + 3 * hidden) + weights, backward)
    flops, shape = 4.0 * rows * width * hidden, shape_of(groups, width, hidden)
    return Problem("nested_mlp", shape, leaves, providers_of(ours, plain), flops, moved)


def mixed_widths(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """A square layer, each half of the rows at a width of its own: the given one, and the largest."""
    rows, dtype, largest = tokens(groups), sizes.dtype, sizes.largest
    parts = ((rows // 2, width), (rows - rows // 2, largest))
    widths = torch.cat([torch.full((count,), w, device=device) for count, w in parts])
    leaves = {
        "x": draw(device, dtype, rows, largest),
        "weight": draw(device, dtype, largest, largest, seed=1, scale=largest**-0.5),
    }

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ek.mixed_width_linear(x, weight, None, widths, widths, scale=None)

    def by_width(x: Tensor, weight: Tensor) -> Tensor:
        outputs = [
            F.pad(F.linear(part[:, :w], weight[:w, :w]), (0, largest - w))
            for part, (_, w) in zip(x.split([count for count, _ in parts]), parts, strict=True)
        ]
        return torch.cat(outputs)

    def padded(x: Tensor, weight: Tensor) -> Tensor:
        within = torch.arange(largest, device=device) < widths.unsqueeze(1)
        return F.linear(x * within, weight) * within

    others = {"padded": lambda: padded, "grouped_mm": lambda: peers.grouped_mm(parts, largest, device)}
    active, weights = sum(count * w for count, w in parts), largest * largest
    flops = 2.0 * sum(count * w * w for count, w in parts)
    moved = bytes_of(dtype, active + rows * largest + weights, active + 2 * rows * largest + 2 * weights)
    providers = providers_of(ours, by_width, **others)
    return Problem("mixed_widths", shape_of(groups, width, largest), leaves, providers, flops, moved)


def mixed_block(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """A whole block: of each crop group half of the sequences at the given width, and half at the largest."""
    largest = sizes.largest
    with torch.device(device):
        module = ek.ElasticBlock(largest, 4 * largest, sizes.head_dim, layer_scale=0.1).to(sizes.dtype)
    halves = [((count // 2, count - count // 2), length) for count, length in groups]
    parts = [
        ((count, length), w)
        for counts, length in halves
        for count, w in zip(counts, (width, largest), strict=True)
    ]
    rows = [count * length for (count, length), _ in parts]
    widths = torch.cat([torch.full((n,), w, device=device) for n, (_, w) in zip(rows, parts, strict=True)])
    leaves = {"x": draw(device, sizes.dtype, sum(rows), largest)} | leaves_of(module)

    def by_width(module: ek.ElasticBlock, x: Tensor) -> Tensor:
        return torch.cat(
            [
                F.pad(naive.block(module, part[:, :w], [group]), (0, largest - w))
                for part, (group, w) in zip(x.split(rows), parts, strict=True)
            ]
        )

    ours = of_module(module, ek.mixed_width_block, groups, widths)
    flops = sum(
        24.0 * n * w * w + attention_flops((group,), w) for n, (group, w) in zip(rows, parts, strict=True)
    )
    active, weights = sum(n * w for n, (_, w) in zip(rows, parts, strict=True)), 12 * largest * largest
    moved = bytes_of(sizes.dtype, 33 * active + weights, 62 * active + 2 * weights)
    providers = providers_of(ours, of_module(module, by_width))
    return Problem("mixed_block", shape_of(groups, width, largest), leaves, providers, flops, moved)


def offsets(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Attention of sequences in an order that only the device knows."""
    rows, dtype = tokens(groups), sizes.dtype
    lengths = [length for count, length in groups for _ in range(count)]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    leaves = {"qkv": draw(device, dtype, rows, 3, width // sizes.head_dim, sizes.head_dim)}

    def ours(qkv: Tensor) -> Tensor:
        return ek.packed_attention(qkv, ends)

    def plain(qkv: Tensor) -> Tensor:
        return naive.attention(qkv, groups)

    def nested(qkv: Tensor) -> Tensor:
        q, k, v = (torch.nested.nested_tensor_from_jagged(t, ends).transpose(1, 2) for t in qkv.unbind(1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values().flatten(1)

    def make_nested() -> Provider:
        if device.type != "cuda":
            raise Unavailable("runs on CUDA only")
        return nested

    flops = sum(4.0 * count * length * length * width for count, length in groups)
    moved = bytes_of(dtype, 4 * rows * width, 8 * rows * width)
    providers = providers_of(ours, plain, nested=make_nested)
    return Problem("offsets", shape_of(groups, width), leaves, providers, flops, moved)
