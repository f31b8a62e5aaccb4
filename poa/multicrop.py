"""Packed crops: all crops of a branch as one token tensor, and the choice of rows of stochastic depth.

The tokens of crop groups of different sizes (2 global views, L local crops) lie one group after the other in
one `[tokens, width]` tensor. Everything but attention treats them as plain rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kernels import KeptRows, upload

Groups = tuple[tuple[int, int], ...]
"""`(crops, tokens a crop)` of each crop group, in packing order."""


def pack(tokens: Sequence[Tensor]) -> tuple[Tensor, Groups]:
    """Concatenate `[crops, length, width]` tensors into `[tokens, width]`; return it with its groups."""
    groups = tuple((t.shape[0], t.shape[1]) for t in tokens)
    return torch.cat([t.flatten(0, 1) for t in tokens]), groups


def unpack(packed: Tensor, groups: Groups) -> list[Tensor]:
    """The inverse of `pack`: views `[crops, length, width]` of each group."""
    parts = packed.split([crops * length for crops, length in groups])
    return [p.unflatten(0, group) for p, group in zip(parts, groups, strict=True)]


def class_tokens(groups: Groups, device: torch.device) -> list[Tensor]:
    """Positions int64 `[crops]` of each group's class tokens in the packed tensor."""
    starts, start = [], 0
    for crops, length in groups:
        starts.append(torch.arange(start, start + crops * length, length, device=device))
        start += crops * length
    return starts


def kept_rows(groups: Groups, kept: Sequence[Tensor], scales: Sequence[float]) -> KeptRows:
    """The rows of the kept crops, given their indices within each group (int64 CPU tensors) and factors."""
    rows, scale, start = [], [], 0
    for (crops, length), index, factor in zip(groups, kept, scales, strict=True):
        rows.append((start + index[:, None] * length + torch.arange(length)).flatten())
        scale.append(torch.full((index.numel() * length,), factor))
        start += crops * length
    sizes = tuple((len(i), length) for i, (_, length) in zip(kept, groups, strict=True))
    return KeptRows(sizes, torch.cat(rows), torch.cat(scale))


@dataclass(frozen=True)
class StochasticDepth:
    """What stochastic depth keeps in one forward.

    Attributes:
        blocks: the kept rows of every active block: `[(attention half, MLP half), ...]`.
        tokens: that every block has, if they have the same.
    """

    blocks: tuple[tuple[KeptRows, KeptRows], ...]
    tokens: int | None = None

    def to(self, device: torch.device) -> StochasticDepth:
        """Move all indices and factors with two copies; a GPU also gets the places of equally many rows."""
        halves = [half for pair in self.blocks for half in pair]
        sizes = [half.rows.numel() for half in halves]
        rows = upload(torch.cat([half.rows for half in halves]), device)
        scale = upload(torch.cat([half.scale for half in halves]), device)
        places: Sequence[Tensor | None] = [None] * len(halves)
        if device.type != "cpu" and self.tokens is not None and len({*sizes}) == 1:
            none = torch.full((len(halves), self.tokens), -1, dtype=torch.int32, device=device)
            numbers = torch.arange(sizes[0], dtype=torch.int32, device=device).expand(len(halves), -1)
            places = none.scatter_(1, rows.view(numbers.shape), numbers).unbind()
        parts = zip(halves, rows.split(sizes), scale.split(sizes), places, strict=True)
        moved = [KeptRows(half.groups, *tensors) for half, *tensors in parts]
        return StochasticDepth(tuple(zip(moved[::2], moved[1::2], strict=True)), self.tokens)


def draw_stochastic_depth(
    groups: Groups, rates: Sequence[float], generator: torch.Generator
) -> StochasticDepth | None:
    """Choose the crops that each half of each active block works on.

    With a rate above 0.1 a fixed number of crops, `max(int(crops * (1 - rate)), 1)`, is kept in each group,
    scaled by `crops / kept`; with a smaller rate every crop is kept with probability `1 - rate` and scaled by
    its inverse (both official).

    Args:
        groups: of the packed tensor.
        rates: drop rate of each active block; all 0 means None is returned.
        generator: a CPU generator.

    Returns:
        CPU tensors; see `StochasticDepth.to`.
    """
    if not any(rates):
        return None
    blocks = [tuple(_draw_half(groups, rate, generator) for _ in range(2)) for rate in rates]
    halves = tuple((attention, mlp) for attention, mlp in blocks)
    return StochasticDepth(halves, sum(crops * length for crops, length in groups))


def _draw_half(groups: Groups, rate: float, generator: torch.Generator) -> KeptRows:
    if rate <= 0.1:
        return draw_samples(groups, rate, generator)
    counts = [max(int(crops * (1 - rate)), 1) for crops, _ in groups]
    sizes = [crops for crops, _ in groups]
    kept = [torch.randperm(n, generator=generator)[:count] for n, count in zip(sizes, counts, strict=True)]
    return kept_rows(groups, kept, [n / count for n, count in zip(sizes, counts, strict=True)])


def draw_samples(groups: Groups, rate: float, generator: torch.Generator) -> KeptRows:
    """Keep every crop with probability `1 - rate`, scaled by its inverse; drawn with a CPU generator."""
    kept = [(torch.rand(crops, generator=generator) >= rate).nonzero().flatten() for crops, _ in groups]
    return kept_rows(groups, kept, [1 / (1 - rate)] * len(groups))
