"""The best subnet within budgets, and the Pareto front: subnets that no other beats at every cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poa.errors import InputError
from poa.subnets import Subnet


@dataclass(frozen=True)
class Cost:
    """Something that a subnet has and a budget may limit: `limit`, inclusive; None where there is none. A
    column has the title; values are written in the form, a format specification."""

    title: str
    form: str
    limit: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A subnet: its quality, of which more is better, and its costs by the title of their `Cost`."""

    subnet: Subnet
    quality: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """A subnet chosen among candidates.

    Attributes:
        best: the chosen one.
        candidates: all, in the order of the search space.
        dominated: for candidates that another beats, by which: as good or better at the same or lower costs.
        axes: the costs that dominance is about.
    """

    best: Candidate
    candidates: Sequence[Candidate]
    dominated: Mapping[Subnet, Subnet]
    axes: Sequence[Cost]

    @property
    def front(self) -> list[Candidate]:
        """Those that none beats."""
        return [c for c in self.candidates if c.subnet not in self.dominated]


def choose(
    candidates: Sequence[Candidate],
    costs: Sequence[Cost],
    quality: str,
    form: str,
    least: float | None = None,
) -> Choice:
    """The best subnet within the limits of costs; of several as good, the cheapest.

    Where only the quality has a limit, the cheapest subnet that reaches it, by the first cost.

    Args:
        candidates: at least one; each has all costs.
        costs: what they cost; dominance is about those with limits, or else about the first.
        quality: what it is called.
        form: format specification of a quality.
        least: lowest quality allowed.

    Raises:
        InputError: none is within the limits; the message names the nearest.
    """
    limited = [cost for cost in costs if cost.limit is not None]
    axes = limited or list(costs[:1])

    def excess(candidate: Candidate) -> float:
        """Sum of the logarithms of how many times limits are exceeded; 0 where all is within."""
        over = [candidate.costs[cost.title] / (cost.limit or 1e-30) for cost in limited]
        under = [least / max(candidate.quality, 1e-30)] if least is not None else []
        return sum(math.log(ratio) for ratio in (*over, *under) if ratio > 1)

    def expense(candidate: Candidate) -> list[float]:
        return [candidate.costs[cost.title] for cost in (*axes, *costs)]

    within = [c for c in candidates if not excess(c)]
    if not within:
        wanted = [f"{cost.title} at most {cost.limit or 0:,.9g}" for cost in limited]
        wanted += [f"{quality} at least {least:{form}}"] if least is not None else []
        near = min(candidates, key=excess)
        got = [f"{cost.title} {near.costs[cost.title]:{cost.form}}" for cost in limited]
        got += [f"{quality} {near.quality:{form}}"]
        raise InputError(
            f"select: expected a subnet with {', '.join(wanted)}, got none of {len(candidates)}; "
            f"the nearest is {near.subnet} with {', '.join(got)}"
        )
    if limited or least is None:
        best = min(within, key=lambda c: (-c.quality, expense(c)))
    else:
        best = min(within, key=lambda c: (expense(c), -c.quality))
    return Choice(best, candidates, _dominated(candidates, [cost.title for cost in axes]), axes)


def _dominated(candidates: Sequence[Candidate], axes: Sequence[str]) -> dict[Subnet, Subnet]:
    """Candidates that another beats, with the best of those that do, which itself none beats."""
    beaten = {}
    for one in candidates:
        better = [other for other in candidates if _beats(other, one, axes)]
        if better:
            best = max(better, key=lambda c: (c.quality, *(-c.costs[axis] for axis in axes)))
            beaten[one.subnet] = best.subnet
    return beaten


def _beats(other: Candidate, one: Candidate, axes: Sequence[str]) -> bool:
    """Whether it is nowhere worse, and somewhere better."""
    ours, theirs = ((-c.quality, *(c.costs[axis] for axis in axes)) for c in (one, other))
    return theirs != ours and all(b <= a for a, b in zip(ours, theirs, strict=True))


def figure_of(choice: Choice, quality: str, scale: float, title: str) -> Any:
    """A figure of quality against each of the costs that dominance is about, with the front and the budgets.

    Qualities are multiplied with `scale`.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(1.0 + 5.4 * len(choice.axes), 4.0), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(choice.axes), squeeze=False)[0]
    for place, cost in zip(panels, choice.axes, strict=True):
        front = sorted(choice.front, key=lambda c: c.costs[cost.title])
        beaten = [c for c in choice.candidates if c.subnet in choice.dominated]
        for group, style, label in ((front, "o", "Pareto front"), (beaten, "o", "dominated")):
            points = [(c.costs[cost.title], scale * c.quality) for c in group]
            fill = {} if group is front else {"markerfacecolor": "white", "color": "grey"}
            if points:
                place.plot(*zip(*points, strict=True), style, label=label, **fill)
        if len(choice.axes) == 1:  # else a cheaper one may still be on the front for another cost
            steps = [(c.costs[cost.title], scale * c.quality) for c in front]
            place.step(*zip(*steps, strict=True), where="post", lw=1)
        best = choice.best
        at = best.costs[cost.title], scale * best.quality
        place.plot(*at, "*", color="C1", ms=16, zorder=0, label=str(best.subnet))
        for c in choice.candidates:
            at = c.costs[cost.title], scale * c.quality
            place.annotate(str(c.subnet), at, (4, -7), textcoords="offset points", fontsize=6)
        if cost.limit is not None:
            place.axvline(cost.limit, color="grey", lw=1, ls="--", label=f"budget {cost.limit:{cost.form}}")
        place.margins(x=0.1)
        place.set(xlabel=cost.title, ylabel=quality)
        place.grid(alpha=0.3)
        place.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def size_of(text: str) -> float:
    """A number that may end in K, M, G (or B) or T, such as `5.5M`. Raises ValueError: it is none."""
    powers = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    power = powers.get(text[-1:].upper())
    value = float(text[:-1]) * power if power else float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
