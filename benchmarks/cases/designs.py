"""Layers of other elastic networks and of newer ViTs, beside naive slicing and other kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    made,
    of_module,
    providers_of,
    shape_of,
)
from benchmarks.failures import require_cuda
from benchmarks.harness import Problem, Provider
from benchmarks.peers import designs as peers
from benchmarks.peers import naive
from benchmarks.roofline.vit import attention_flops, tokens

EPS = 1e-6


def rms_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {"x": draw(device, dtype, rows, width), "weight": draw(device, dtype, sizes.largest, seed=1)}

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight[:width], EPS)

    ours = partial(ek.elastic_rms_norm, eps=EPS)
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
    """RMSNorm of queries and keys of each head, and a rotary embedding of pairs half a head apart."""
    rows, dtype, dim = tokens(groups), sizes.dtype, sizes.head_dim
    leaves = {
        "qkv": draw(device, dtype, rows, 3, width // dim, dim),
        "weight": draw(device, dtype, 2, dim, seed=1),
    }
    angles = draw(device, torch.float32, rows, dim // 2, seed=2).repeat(1, 2)
    rotary = ek.Rotary(angles.sin(), angles.cos(), halves=True)

    def turned(norm: Callable[[Tensor, Tensor], Tensor]) -> Provider:
        def provider(qkv: Tensor, weight: Tensor) -> Tensor:
            q, k = (norm(qkv[:, part], weight[part]) for part in range(2))
            return rotary.turn(torch.stack([q, k, qkv[:, 2]], 1))

        return provider

    others = {
        "liger": lambda: peers.liger_qk_norm(EPS, rotary, device),
        "quack": lambda: turned(peers.quack(EPS, device)),
    }
    ours = partial(ek.qk_norm, eps=EPS, rotary=rotary)
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


def patch_embed(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Patches of three channels, as many as tokens, in images of one row of patches."""
    rows, dtype, side, largest = tokens(groups), sizes.dtype, sizes.head_dim // 4, sizes.largest
    module = made(lambda: ek.ElasticPatchEmbed(side, largest), device, sizes)
    leaves = {"x": draw(device, dtype, 1, 3, side, rows * side), **leaves_of(module)}

    def plain(m: ek.ElasticPatchEmbed, x: Tensor) -> Tensor:
        assert m.proj.bias is not None
        y = F.conv2d(x, m.proj.weight[:width], m.proj.bias[:width], stride=side)
        return y.flatten(2).transpose(1, 2)

    inner = 3 * side * side
    moved = bytes_of(dtype, rows * (inner + width) + inner * width, rows * (2 * inner + width))
    ours, naively = of_module(module, ek.ElasticPatchEmbed.forward, width), of_module(module, plain)
    providers, flops = providers_of(ours, naively), 2.0 * rows * inner * width
    return Problem("patch_embed", shape_of(groups, inner, width), leaves, providers, flops, moved)


def conv1x1(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Channels-last maps, as many positions as tokens; half of the channels out."""
    rows, dtype, largest, out = tokens(groups), sizes.dtype, sizes.largest, width // 2
    module = made(lambda: ek.ElasticConv1x1(largest, largest), device, sizes)
    leaves = {"x": draw(device, dtype, 1, rows, 1, width), **leaves_of(module)}

    def plain(m: ek.ElasticConv1x1, x: Tensor) -> Tensor:
        assert m.bias is not None
        x = x * (largest / width) if width < largest else x
        return F.conv2d(x.permute(0, 3, 1, 2), m.weight[:out, :width], m.bias[:out]).permute(0, 2, 3, 1)

    def convolved(m: ek.ElasticConv1x1, x: Tensor) -> Tensor:
        return m(x.permute(0, 3, 1, 2), out).permute(0, 2, 3, 1)

    def product(m: ek.ElasticConv1x1, x: Tensor) -> Tensor:
        return naive.linear(x, m.weight.flatten(1), m.bias, out)

    ours, naively, linear = (of_module(module, f) for f in (convolved, plain, product))
    providers = providers_of(ours, naively, linear=lambda: linear)
    moved = bytes_of(dtype, rows * (width + out) + width * out, rows * (2 * width + out) + 2 * width * out)
    flops, shape = 2.0 * rows * width * out, shape_of(groups, width, out)
    return Problem("conv1x1", shape, leaves, providers, flops, moved)


def offsets(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """Attention of sequences in an order that only the device knows."""
    rows, dtype = tokens(groups), sizes.dtype
    lengths = [length for count, length in groups for _ in range(count)]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    leaves = {"qkv": draw(device, dtype, rows, 3, width // sizes.head_dim, sizes.head_dim)}

    def nested(qkv: Tensor) -> Tensor:
        q, k, v = (torch.nested.nested_tensor_from_jagged(t, ends).transpose(1, 2) for t in qkv.unbind(1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values().flatten(1)

    def make_nested() -> Provider:
        require_cuda(device)
        return nested

    flops = attention_flops(groups, width)
    moved = bytes_of(dtype, 4 * rows * width, 8 * rows * width)
    ours, plain = partial(ek.packed_attention, groups=ends), partial(naive.attention, groups=groups)
    providers = providers_of(ours, plain, nested=make_nested)
    return Problem("offsets", shape_of(groups, width), leaves, providers, flops, moved)
