"""Operators of a transformer block, and the block."""

from __future__ import annotations

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
from benchmarks.harness import Problem
from benchmarks.peers import attention as attention_peers
from benchmarks.peers import layer_norm as layer_norm_peers
from benchmarks.peers import naive
from benchmarks.roofline.vit import attention_flops, tokens

EPS = 1e-6


def layer_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {
        "x": draw(device, dtype, rows, width),
        "weight": draw(device, dtype, sizes.largest, seed=1),
        "bias": draw(device, dtype, sizes.largest, seed=2),
    }

    ours, plain = partial(ek.elastic_layer_norm, eps=EPS), partial(naive.layer_norm, eps=EPS)
    providers = providers_of(ours, plain) | layer_norm_peers.peers(EPS, device)
    moved = bytes_of(dtype, 2 * rows * width, 3 * rows * width)
    return Problem("layer_norm", shape_of(groups, width), leaves, providers, 0.0, moved)


def attention(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, dtype = tokens(groups), sizes.dtype
    leaves = {"qkv": draw(device, dtype, rows, 3, width // sizes.head_dim, sizes.head_dim)}

    ours, plain = (partial(attend, groups=groups) for attend in (ek.packed_attention, naive.attention))
    providers = providers_of(ours, plain) | attention_peers.peers(groups, device)
    moved = bytes_of(dtype, 4 * rows * width, 8 * rows * width)
    flops = attention_flops(groups, width)
    return Problem("attention", shape_of(groups, width), leaves, providers, flops, moved)


def _weight(device: torch.device, sizes: Sizes, out: int, inner: int, seed: int) -> dict[str, Tensor]:
    return {
        "weight": draw(device, sizes.dtype, out, inner, seed=seed, scale=inner**-0.5),
        "bias": draw(device, sizes.dtype, out, seed=seed + 1),
    }


def _product_bytes(dtype: torch.dtype, rows: int, out: int, inner: int) -> dict[str, float]:
    """Forward reads x and W and writes y; backward reads dy, x and W and writes dx and dW."""
    activations, weight = rows * (out + inner), out * inner
    return bytes_of(dtype, activations + weight, rows * (out + 2 * inner) + 2 * weight)


def linear(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """fc1 without its GELU, and bare cuBLAS on a packed copy of the corner."""
    rows, out, most = tokens(groups), 4 * width, 4 * sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, most, sizes.largest, 1)}

    def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Fast where the corner is the whole weight; elsewhere it shows what the copy costs."""
        scale = sizes.largest / width
        return F.linear(x, (weight[:out, :width] * scale).contiguous(), bias[:out])

    ours, plain = (partial(product, out_features=out) for product in (ek.elastic_linear, naive.linear))
    providers = providers_of(ours, plain, packed=lambda: packed)
    moved = _product_bytes(sizes.dtype, rows, out, width)
    return Problem("linear", shape_of(groups, width, out), leaves, providers, 2.0 * rows * out * width, moved)


def linear_gelu(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, out, most = tokens(groups), 4 * width, 4 * sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, most, sizes.largest, 1)}

    ours = partial(ek.elastic_linear, out_features=out, activation="gelu")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(naive.linear(x, weight, bias, out))

    moved = _product_bytes(sizes.dtype, rows, out, width)
    extra = sizes.dtype.itemsize * rows * out  # the sum before the GELU, kept and read again
    moved = {mode: size + extra * len(mode.split("+")) for mode, size in moved.items()}
    shape, flops = shape_of(groups, width, out), 2.0 * rows * out * width
    return Problem("linear_gelu", shape, leaves, providers_of(ours, plain), flops, moved)


def qkv(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, largest = tokens(groups), sizes.largest
    leaves = {"x": draw(device, sizes.dtype, rows, width), **_weight(device, sizes, 3 * largest, largest, 1)}
    moved = _product_bytes(sizes.dtype, rows, 3 * width, width)
    flops = 2.0 * rows * 3 * width * width
    providers = providers_of(ek.elastic_qkv, naive.qkv)
    return Problem("qkv", shape_of(groups, width, 3 * width), leaves, providers, flops, moved)


def linear_residual(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, largest = tokens(groups), sizes.largest
    leaves = {
        "x": draw(device, sizes.dtype, rows, width),
        **_weight(device, sizes, largest, largest, 1),
        "residual": draw(device, sizes.dtype, rows, width, seed=3),
        "gamma": draw(device, sizes.dtype, largest, seed=4),
    }

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
        return naive.residual(residual, naive.linear(x, weight, bias, width), gamma, None)

    moved = _product_bytes(sizes.dtype, rows, width, width)
    extra = sizes.dtype.itemsize * rows * width
    moved = {"fwd": moved["fwd"] + extra, "bwd": moved["bwd"], "fwd+bwd": moved["fwd+bwd"] + extra}
    shape, flops = shape_of(groups, width, width), 2.0 * rows * width * width
    providers = providers_of(ek.elastic_linear_residual, plain)
    return Problem("linear_residual", shape, leaves, providers, flops, moved)


def mlp(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    rows, largest, most = tokens(groups), sizes.largest, 4 * sizes.largest
    first, second = _weight(device, sizes, most, largest, 1), _weight(device, sizes, largest, most, 3)
    leaves = {
        "x": draw(device, sizes.dtype, rows, width),
        "fc1": first["weight"],
        "b1": first["bias"],
        "fc2": second["weight"],
        "b2": second["bias"],
    }

    def ours(x: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor) -> Tensor:
        return ek.elastic_mlp(x, fc1, b1, fc2, b2)

    hidden, flops = 4 * width, 16.0 * rows * width * width
    one, two = (_product_bytes(sizes.dtype, rows, *s) for s in ((hidden, width), (width, hidden)))
    moved = {mode: one[mode] + two[mode] for mode in one}
    return Problem(
        "mlp", shape_of(groups, width, hidden), leaves, providers_of(ours, naive.mlp), flops, moved
    )


def block(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    """A whole block; its bytes are the cost model's."""
    largest, rows = sizes.largest, tokens(groups)
    module = made(
        lambda: ek.ElasticBlock(largest, 4 * largest, sizes.head_dim, layer_scale=0.1), device, sizes
    )
    leaves = {"x": draw(device, sizes.dtype, rows, width), **leaves_of(module)}
    flops = 24.0 * rows * width * width + attention_flops(groups, width)
    weights = 12 * width * width
    # Forward: 2 norms, qkv, attention, proj, fc1, fc2 in and out; backward about twice, saved tensors read.
    moved = bytes_of(sizes.dtype, 33 * rows * width + weights, 62 * rows * width + 2 * weights)
    ours, plain = (of_module(module, f, groups) for f in (ek.ElasticBlock.forward, naive.block))
    return Problem("block", shape_of(groups, width), leaves, providers_of(ours, plain), flops, moved)
