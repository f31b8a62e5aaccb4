"""Which subnets there are, how often each is trained, and which one is trained when.

A subnet is a prefix of the shared weights: the first `width` channels of `depth` of the blocks, or of
those of each stage. Small subnets are drawn more often than large ones, without replacement. A draw is a
function of (seed, step, micro-batch).

Source: POA (Zhang et al., ECCV 2024), section 3.3; official `create_dynamic_networks`, `get_network_id`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from poa.errors import InputError
from poa.random import python_stream

POLICIES = ("per-rank", "shared", "balanced")

Depth = int | tuple[int, ...]
"""Blocks of a network, or of each of its stages."""


@dataclass(frozen=True)
class Subnet:
    """One network inside the shared weights.

    Attributes:
        width: active channels, of the first stage where there are several.
        depth: active blocks, or those of each stage.

    Example:
        >>> from poa import Subnet
        >>> Subnet.parse("384x12")
        Subnet(width=384, depth=12)
    """

    width: int
    depth: Depth

    def __str__(self) -> str:
        return f"{self.width}x{depth_text(self.depth)}"

    def __lt__(self, other: Subnet) -> bool:
        return (self.width, self.blocks) < (other.width, other.blocks)  # also of another backbone

    @property
    def blocks(self) -> tuple[int, ...]:
        """Active blocks of each stage."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)

    @classmethod
    def parse(cls, text: str) -> Subnet:
        """Read `WIDTHxDEPTH`, for example `384x12` or `64x3-4-6-3`."""
        width, cross, depth = text.strip().partition("x")
        stages = depth.split("-")
        if not (cross and width.isdecimal() and all(stage.isdecimal() for stage in stages)):
            raise InputError(f"subnet: expected WIDTHxDEPTH such as 384x12 or 64x3-4-6-3, got {text!r}")
        blocks = tuple(int(stage) for stage in stages)
        return cls(int(width), blocks if len(blocks) > 1 else blocks[0])


def depth_text(depth: int | Sequence[int]) -> str:
    """`12`, or `3-4-6-3`."""
    return str(depth) if isinstance(depth, int) else "-".join(map(str, depth))


def active_blocks(max_depth: int, depth: int) -> list[int]:
    """Indices of the blocks a subnet keeps: `floor(linspace(0, max_depth - 1, depth))`."""
    # Not by NumPy, whose integers torch.compile cannot take as indices.
    last = max_depth - 1
    return [0] if depth == 1 else [*(int(i * (last / (depth - 1))) for i in range(depth - 1)), last]


def stage_depths(smallest: Sequence[int], largest: Sequence[int]) -> tuple[Depth, ...]:
    """All depths between two, each stage on its own, in order of their sums (official)."""
    ranges = (range(low, high + 1) for low, high in zip(smallest, largest, strict=True))
    return tuple(sorted(itertools.product(*ranges), key=sum))


@dataclass(frozen=True)
class SearchSpace:
    """All subnets of a backbone, with how often each is drawn.

    Attributes:
        widths, depths: what may be chosen, ascending; the last of each is the intact network.
        width_scale, depth_scale: how much more often the smallest is drawn than the largest.

    Example:
        >>> from poa import SearchSpace
        >>> space = SearchSpace(widths=(192, 256, 384), depths=(6, 12))
        >>> len(space), str(space.smallest), str(space.intact)
        (6, '192x6', '384x12')
    """

    widths: tuple[int, ...]
    depths: tuple[Depth, ...]
    width_scale: float = 3.0
    depth_scale: float = 3.0

    @property
    def intact(self) -> Subnet:
        return Subnet(self.widths[-1], self.depths[-1])

    @property
    def smallest(self) -> Subnet:
        return Subnet(self.widths[0], self.depths[0])

    def __iter__(self) -> Iterator[Subnet]:
        return (Subnet(width, depth) for width in self.widths for depth in self.depths)

    def __len__(self) -> int:
        return len(self.widths) * len(self.depths)

    def __contains__(self, subnet: object) -> bool:
        return isinstance(subnet, Subnet) and subnet.width in self.widths and subnet.depth in self.depths

    def require(self, subnet: Subnet) -> Subnet:
        """Return the subnet, or raise InputError if it is outside the space."""
        if subnet not in self:
            raise InputError(
                f"subnet {subnet}: expected a width of {_span(self.widths)} "
                f"and a depth of {_span_of_depths(self.depths)}"
            )
        return subnet

    def named(self, names: Sequence[str]) -> list[Subnet]:
        """The subnets of these names, which may also be joined by commas; `["all"]`: every one.

        Raises:
            InputError: none, or one that is not in the space.
        """
        if list(names) == ["all"]:
            return list(self)
        parts = [part for name in names for part in name.split(",") if part]
        if not parts:
            raise InputError(
                f"--subnets: expected subnets such as {self.smallest}, or all, got {' '.join(names)!r}"
            )
        return [self.require(Subnet.parse(part)) for part in dict.fromkeys(parts)]

    def multiplicities(self) -> dict[Subnet, int]:
        """How often each subnet stands in one round of draws: `round(ws * ds)`, half to even."""
        width_scale = np.linspace(self.width_scale, 1, len(self.widths))
        depth_scale = np.linspace(self.depth_scale, 1, len(self.depths))
        return {
            Subnet(width, depth): int(np.round(ws * ds))
            for width, ws in zip(self.widths, width_scale, strict=True)
            for depth, ds in zip(self.depths, depth_scale, strict=True)
        }

    def round_of_draws(self) -> list[Subnet]:
        """The multiset drawn without replacement: every subnet as often as its multiplicity.

        The last entry, one copy of the intact network, is left out: it is trained in every step anyway. A
        space of one subnet draws that one.
        """
        entries = [s for s, count in self.multiplicities().items() for _ in range(count)]
        return entries[:-1] or entries


class SubnetSampler:
    """Draws the elastic student's subnet of every micro-batch of every step, over all ranks.

    Policies:
        per-rank: every micro-batch goes through its own shuffled rounds (official); a step waits for the
            largest.
        shared: one draw for all micro-batches of a step.
        balanced: the micro-batches of a step get subnets of about equal cost, in FLOPs. Each round is sorted
            by it and cut into groups of neighbours, one group a step, in random order; what is left over
            (chosen at random) joins the next round. Over `micro_batches` rounds every subnet is drawn exactly
            as often as under per-rank. For the ViT-L space the most expensive of 8 micro-batches costs on
            average 1.5 % more than the mean of its step (at worst 9 %), of 32 micro-batches 7.5 % (27 %);
            under per-rank that is 103 % and 158 %.
    """

    def __init__(
        self, space: SearchSpace, policy: str, seed: int, micro_batches: int, cost: Callable[[Subnet], float]
    ):
        if policy not in POLICIES:
            raise InputError(f"sampling policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self.entries = space.round_of_draws()
        self.policy = policy
        self.seed = seed
        self.micro_batches = micro_batches
        self.cost = cost
        # A few rounds suffice: draws advance by one step at a time.
        self._round = lru_cache(maxsize=max(8, micro_batches))(self._shuffled_round)
        self._groups = lru_cache(maxsize=2)(self._balanced_cycle)

    def draw(self, step: int, micro_batch: int) -> Subnet:
        """The subnet of a micro-batch at a step; the same on every rank that asks."""
        if not 0 <= micro_batch < self.micro_batches:
            raise ValueError(f"micro_batch: expected 0..{self.micro_batches - 1}, got {micro_batch}")
        if self.policy == "balanced":
            cycle, position = divmod(step, self._steps_a_cycle)
            return self._groups(cycle)[position][micro_batch]
        turn, position = divmod(step, len(self.entries))
        return self._round(turn, 0 if self.policy == "shared" else micro_batch)[position]

    def _shuffled_round(self, turn: int, micro_batch: int) -> list[Subnet]:
        entries = list(self.entries)
        python_stream(self.seed, "subnets", turn, micro_batch).shuffle(entries)
        return entries

    @property
    def _steps_a_cycle(self) -> int:
        """Steps after which a balanced sampler has no leftovers: a whole number of rounds."""
        return len(self.entries) // math.gcd(len(self.entries), self.micro_batches)

    def _balanced_cycle(self, cycle: int) -> list[list[Subnet]]:
        """The groups of one cycle, a group a step, in order of steps."""
        draw = python_stream(self.seed, "balanced", cycle)
        steps: list[list[Subnet]] = []
        pool: list[Subnet] = []
        while len(steps) < self._steps_a_cycle:
            pool += self.entries
            draw.shuffle(pool)
            spare = len(pool) % self.micro_batches
            leftovers, pool = pool[:spare], sorted(pool[spare:], key=self.cost)
            groups = [pool[i : i + self.micro_batches] for i in range(0, len(pool), self.micro_batches)]
            for group in groups:
                draw.shuffle(group)
            draw.shuffle(groups)
            steps += groups
            pool = leftovers
        return steps


def _span_of_depths(depths: Sequence[Depth]) -> str:
    """The values of a depth, or those of each stage, several in brackets: `2-2-(6..18 step 1)-2`."""
    stages = zip(*(depth if isinstance(depth, tuple) else (depth,) for depth in depths), strict=True)
    spans = [_span(sorted(set(stage))) for stage in stages]
    return "-".join(span if len(spans) == 1 or span.isdecimal() else f"({span})" for span in spans)


def _span(values: Sequence[int]) -> str:
    steps = {b - a for a, b in zip(values, values[1:], strict=False)}
    if len(values) > 3 and len(steps) == 1:
        return f"{values[0]}..{values[-1]} step {steps.pop()}"
    return ", ".join(str(v) for v in values)
