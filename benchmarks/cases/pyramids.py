"""Operators of Swin transformers and ResNets, and their blocks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

import elastic_kernels as ek
from benchmarks.cases.common import Groups, Sizes, bytes_of, draw, leaves_of, made, of_module, providers_of
from benchmarks.harness import Problem
from benchmarks.peers import designs, naive
from benchmarks.roofline import resnet, swin
from benchmarks.roofline.costs import HALF, Cost
from benchmarks.roofline.transformer import Block

HEAD_DIM, EPS = 16, 1e-5
Maps = list[tuple[int, int, int]]


def _maps(sizes: Sizes, stage: int) -> Maps:
    return [(count, -(-height >> stage), -(-width >> stage)) for count, height, width in sizes.maps]


def _shape(maps: Maps, *numbers: int) -> str:
    return f"{'+'.join('x'.join(map(str, m)) for m in maps)} {'x'.join(map(str, numbers))}"


def _modelled(costs: Iterable[Cost], dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """FLOPs of the forward and bytes by mode, out of the cost model."""
    costs = list(costs)
    forward, backward = (
        sum(c.bytes for c in costs if c.phase == phase) / HALF for phase in ("forward", "backward")
    )
    flops = sum(c.flops for c in costs if c.phase == "forward")
    return flops, bytes_of(dtype, forward, backward)


def window_attention(device: torch.device, sizes: Sizes, groups: Groups, stage: int) -> Problem:
    maps, dtype = _maps(sizes, stage), sizes.dtype
    largest, width = (w * 2**stage for w in sizes.pyramid)
    rows, n, shift = sum(c * h * w for c, h, w in maps), sizes.window**2, sizes.window // 2
    leaves = {
        "qkv": draw(device, dtype, rows, 3, width // HEAD_DIM, HEAD_DIM),
        "bias": draw(device, torch.float32, largest // HEAD_DIM, n, n, seed=1),
        "pad": draw(device, dtype, 3, largest // HEAD_DIM, HEAD_DIM, seed=2),
    }

    ours, plain = (
        partial(attend, maps=maps, window=sizes.window, shift=shift)
        for attend in (ek.window_attention, naive.window_attention)
    )
    flops = swin.attention(sizes.window, [(count, side) for count, side, _ in maps], width).flops
    moved = bytes_of(dtype, 4 * rows * width, 7 * rows * width)
    shape = _shape(maps, width)
    return Problem("window_attention", shape, leaves, providers_of(ours, plain), flops, moved)


def swin_block(device: torch.device, sizes: Sizes, groups: Groups, stage: int) -> Problem:
    maps = _maps(sizes, stage)
    largest, width = (w * 2**stage for w in sizes.pyramid)
    window, shift = sizes.window, sizes.window // 2
    module = made(lambda: ek.ElasticSwinBlock(largest, 4 * largest, HEAD_DIM, window, shift), device, sizes)
    rows = sum(c * h * w for c, h, w in maps)
    leaves = {"x": draw(device, sizes.dtype, rows, width), **leaves_of(module)}
    within = swin.attention(sizes.window, [(count, side) for count, side, _ in maps], width)
    block = Block("intact", width, 4 * width, rows, rows, within, HALF)
    flops, moved = _modelled(block.costs(), sizes.dtype)
    ours, plain = (of_module(module, f, maps) for f in (ek.ElasticSwinBlock.forward, naive.swin_block))
    return Problem("swin_block", _shape(maps, width), leaves, providers_of(ours, plain), flops, moved)


def group_norm(device: torch.device, sizes: Sizes, groups: Groups, stage: int) -> Problem:
    """Of the larger crops, with the channels of the middle of a bottleneck."""
    count, height, width = _maps(sizes, stage)[-1]
    largest, channels = (w * 2**stage for w in sizes.pyramid)
    shape = (count, height, width, channels)
    leaves = {
        "x": draw(device, sizes.dtype, *shape),
        "weight": draw(device, sizes.dtype, largest, seed=1),
        "bias": draw(device, sizes.dtype, largest, seed=2),
        "residual": draw(device, sizes.dtype, *shape, seed=3),
    }

    ours, plain = (
        partial(normalise, groups=sizes.norm_groups, eps=EPS, activation="relu")
        for normalise in (ek.elastic_group_norm, naive.group_norm)
    )
    elements = count * height * width * channels
    forward = resnet.norm("intact", "norm", elements, residual=True)
    backward = resnet.norm_backward("intact", "norm", elements, residual=True)
    _, moved = _modelled((forward, backward), sizes.dtype)
    others = {"liger": lambda: designs.liger_group_norm(sizes.norm_groups, EPS, device)}
    providers = providers_of(ours, plain, **others)
    return Problem("group_norm", "x".join(map(str, shape)), leaves, providers, 0.0, moved)


def bottleneck(device: torch.device, sizes: Sizes, groups: Groups, stage: int) -> Problem:
    """One that keeps the size of its maps, on the larger crops."""
    count, height, width = _maps(sizes, stage)[-1]
    largest, middle = (w * 2**stage for w in sizes.pyramid)
    out = 2 * largest
    module = made(lambda: ek.ElasticBottleneck(out, largest, out, sizes.norm_groups), device, sizes)
    rows = count * height * width
    leaves = {"x": draw(device, sizes.dtype, count, height, width, out), **leaves_of(module)}
    costs = resnet.block("intact", rows, rows, out, middle, out, projected=False)
    flops, moved = _modelled(costs, sizes.dtype)
    ours, plain = (of_module(module, f, middle) for f in (ek.ElasticBottleneck.forward, naive.bottleneck))
    shape = f"{count}x{height}x{width}x{out} {middle}"
    return Problem("bottleneck", shape, leaves, providers_of(ours, plain), flops, moved)
