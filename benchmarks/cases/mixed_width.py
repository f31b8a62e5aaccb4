"""Layers on rows of two widths: of each crop group half at the given one, and half at the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import elastic_kernels as ek
from benchmarks.cases.common import (
    Groups,
    M,
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
from benchmarks.peers import naive
from benchmarks.peers.mixed_width import GroupedMM, Padded, Part, by_width
from benchmarks.roofline.vit import attention_flops

EPS = 1e-6


def _parts(groups: Groups, *widths: int) -> Iterator[Part]:
    for count, length in groups:
        for n, width in zip((count // 2, count - count // 2), widths, strict=True):
            yield Part((n, length), width)


def _problem(
    op: str,
    device: torch.device,
    sizes: Sizes,
    groups: Groups,
    width: int,
    module: M,
    ours: Callable[[M, Tensor, Tensor], Tensor],
    sliced: Callable[[M, Tensor, Part], Tensor],
    whole: Callable[[Padded, M, Tensor], Tensor],
    cost: tuple[int, float, float],
) -> Problem:
    """A module's, that of the largest network: ours on rows and their widths, naively sliced on rows of one
    width, whole by masks on all rows.

    The cost is entries of its products in squares of the width, and elements that forward and backward move
    of each row in widths.
    """
    largest = sizes.largest
    parts = list(_parts(groups, width, largest))
    kit = Padded(parts, largest, device)

    def provider(forward: Callable[[M, Tensor], Tensor]) -> Callable[..., Tensor]:
        return of_module(module, forward)

    def masked(kind: type[Padded]) -> Callable[[], Callable[..., Tensor]]:
        return lambda: provider(lambda m, x: whole(kind(parts, largest, device), m, x))

    products, forward, backward = cost
    active, weights = sum(part.rows * part.width for part in parts), products * largest * largest
    flops = 2.0 * products * sum(part.rows * part.width**2 for part in parts)
    if op in ("mixed_attention", "mixed_block"):
        flops += sum([attention_flops((part.group,), part.width) for part in parts])
    others = {"padded": masked(Padded), **({"grouped_mm": masked(GroupedMM)} if products else {})}
    providers = providers_of(
        provider(lambda m, x: ours(m, x, kit.widths)),
        provider(lambda m, x: by_width(parts, lambda rows, part: sliced(m, rows, part))(x)),
        **others,
    )
    leaves = {"x": draw(device, sizes.dtype, len(kit.widths), largest), **leaves_of(module)}
    moved = bytes_of(sizes.dtype, forward * active + weights, backward * active + 2 * weights)
    return Problem(op, shape_of(groups, width, largest), leaves, providers, flops, moved)


def mixed_linear(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    layer = made(lambda: ek.ElasticLinear(sizes.largest, sizes.largest), device, sizes)
    return _problem(
        "mixed_linear", device, sizes, groups, width, layer,
        lambda m, x, widths: ek.mixed_width_linear(x, m.weight, m.bias, widths, widths),
        lambda m, x, part: naive.linear(x, m.weight, m.bias, part.width),
        lambda kit, m, x: kit.linear(x * kit.within(x.shape[1]), m.weight, m.bias).flatten(1),
        (1, 2, 3),
    )  # fmt: skip


def mixed_norm(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    norm = made(lambda: ek.ElasticLayerNorm(sizes.largest, EPS), device, sizes)
    return _problem(
        "mixed_norm", device, sizes, groups, width, norm,
        lambda m, x, widths: ek.mixed_width_layer_norm(x, m.weight, m.bias, EPS, widths),
        lambda m, x, part: naive.layer_norm(x, m.weight, m.bias, EPS),
        lambda kit, m, x: kit.layer_norm(m, x),
        (0, 2, 3),
    )  # fmt: skip


def mixed_mlp(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    mlp = made(lambda: ek.ElasticMLP(sizes.largest, 4 * sizes.largest), device, sizes)
    return _problem(
        "mixed_mlp", device, sizes, groups, width, mlp,
        ek.mixed_width_mlp,
        lambda m, x, part: naive.mlp(x, m.fc1.weight, m.fc1.bias, m.fc2.weight, m.fc2.bias),
        lambda kit, m, x: kit.mlp(m, x * kit.within(x.shape[1])),
        (8, 14, 28),
    )  # fmt: skip


def mixed_attention(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    attn = made(lambda: ek.ElasticAttention(sizes.largest, sizes.head_dim), device, sizes)

    def sliced(m: ek.ElasticAttention, x: Tensor, part: Part) -> Tensor:
        h = naive.qkv(x, m.qkv.weight, m.qkv.bias).unflatten(-1, (-1, m.head_dim))
        h = naive.attention(h, [part.group])
        return naive.linear(h, m.proj.weight, m.proj.bias, part.width)

    return _problem(
        "mixed_attention", device, sizes, groups, width, attn,
        lambda m, x, widths: ek.mixed_width_attention(m, x, groups, widths),
        sliced,
        lambda kit, m, x: kit.attention(m, x * kit.within(x.shape[1])),
        (4, 10, 20),
    )  # fmt: skip


def mixed_block(device: torch.device, sizes: Sizes, groups: Groups, width: int) -> Problem:
    largest = sizes.largest
    block = made(
        lambda: ek.ElasticBlock(largest, 4 * largest, sizes.head_dim, layer_scale=0.1), device, sizes
    )
    return _problem(
        "mixed_block", device, sizes, groups, width, block,
        lambda m, x, widths: ek.mixed_width_block(m, x, groups, widths),
        lambda m, x, part: naive.block(m, x, [part.group]),
        lambda kit, m, x: kit.block(m, x),
        (12, 33, 62),
    )  # fmt: skip
