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

CPU = torch.device("cpu")
Groups = tuple[tuple[int, int], ...]
"""`(crops, tokens a crop)` of each crop group, in packing order."""


def unpack(packed: Tensor, groups: Groups) -> list[Tensor]:
    """Views `[crops, length, width]` of each group."""
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
    """The kept rows of every active block of one forward: `[(attention half, MLP half), ...]`."""

    blocks: tuple[tuple[KeptRows, KeptRows], ...]

    def to(self, device: torch.device) -> StochasticDepth:
        """Move all indices and factors with two copies, if they are not there."""
        halves = [half for pair in self.blocks for half in pair]
        if halves[0].rows.device == device:
            return self
        sizes = [half.rows.numel() for half in halves]
        rows = upload(torch.cat([half.rows for half in halves]), device).split(sizes)
        scale = upload(torch.cat([half.scale for half in halves]), device).split(sizes)
        moved = [KeptRows(h.groups, r, s) for h, r, s in zip(halves, rows, scale, strict=True)]
        return StochasticDepth(tuple(zip(moved[::2], moved[1::2], strict=True)))


def draw_stochastic_depth(
    groups: Groups, rates: Sequence[float], generator: torch.Generator, device: torch.device = CPU
) -> StochasticDepth | None:
    """Choose, with a CPU generator, the crops that each half of each active block works on; None if all rates
    are 0.

    With a rate above 0.1 a fixed number of crops, `max(int(crops * (1 - rate)), 1)`, is kept in each group,
    scaled by `crops / kept`; with a smaller rate every crop is kept with probability `1 - rate` and scaled by
    its inverse (both official).
    """
    if not any(rates):
        return None
    rates = [rate for rate in rates for _ in range(2)]
    if len({*rates}) == 1 and rates[0] > 0.1:
        drawn = [_draw_counts(groups, rate, generator) for rate in rates]
        halves = _of_equal_counts(groups, drawn, device)
        return StochasticDepth(tuple(zip(halves[::2], halves[1::2], strict=True)))
    halves = [_draw_half(groups, rate, generator) for rate in rates]
    return StochasticDepth(tuple(zip(halves[::2], halves[1::2], strict=True))).to(device)


def _draw_half(groups: Groups, rate: float, generator: torch.Generator) -> KeptRows:
    if rate <= 0.1:
        return draw_samples(groups, rate, generator)
    kept = _draw_counts(groups, rate, generator)
    return kept_rows(groups, kept, _factors(groups, kept))


def _draw_counts(groups: Groups, rate: float, generator: torch.Generator) -> list[Tensor]:
    """The crops that are kept of each group, a fixed number."""
    return [torch.randperm(n, generator=generator)[: max(int(n * (1 - rate)), 1)] for n, _ in groups]


def _factors(groups: Groups, kept: Sequence[Tensor]) -> list[float]:
    return [crops / len(index) for (crops, _), index in zip(groups, kept, strict=True)]


def _of_equal_counts(
    groups: Groups, drawn: Sequence[Sequence[Tensor]], device: torch.device
) -> list[KeptRows]:
    """As `kept_rows` of each half, made on the device for all of them at once, on a GPU with their places."""
    parts, start = [], 0
    for (crops, length), *kept in zip(groups, *drawn, strict=True):
        index = upload(torch.stack(kept), device)
        firsts = torch.add(start, index, alpha=length).unsqueeze(-1)
        parts.append((firsts + torch.arange(length, device=device)).flatten(1))
        start += crops * length
    rows = torch.cat(parts, 1)
    one = kept_rows(groups, drawn[0], _factors(groups, drawn[0]))  # factors are those of every half
    scale = upload(one.scale, device)
    places: Sequence[Tensor | None] = [None] * len(drawn)
    if device.type != "cpu":
        numbers = torch.arange(rows.shape[1], dtype=torch.int32, device=device).expand(rows.shape)
        nowhere = torch.full((len(drawn), start), -1, dtype=torch.int32, device=device)
        places = nowhere.scatter_(1, rows, numbers).unbind()
    return [KeptRows(one.groups, row, scale, place) for row, place in zip(rows.unbind(), places, strict=True)]


def draw_samples(groups: Groups, rate: float, generator: torch.Generator) -> KeptRows:
    """Keep every crop with probability `1 - rate`, scaled by its inverse; drawn with a CPU generator."""
    kept = [(torch.rand(crops, generator=generator) >= rate).nonzero().flatten() for crops, _ in groups]
    return kept_rows(groups, kept, [1 / (1 - rate)] * len(groups))
