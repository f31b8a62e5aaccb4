"""Figures of protocols over the size of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poa.drawing import write_figure
from poa.evaluate.protocol import Protocol
from poa.evaluate.robustness import ROBUSTNESS, curves
from poa.evaluate.suite import PROTOCOLS

if TYPE_CHECKING:
    from poa.evaluate.scores import Report, SubnetScore

COLUMNS = 4  # panels side by side


def plot_reports(reports: Sequence[Report], path: Path | None = None) -> Any:
    """Draw the figure of each protocol against parameters; hollow: before training.

    Of one report subnets of a width are a line, and baselines are horizontal lines; of several, as of models,
    each has a name in the legend. A `path` is written to, too; its ending chooses the format. Returns a
    figure of matplotlib. Curves of robustness over the strength of damage go into another file,
    `NAME-robustness`.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    lines = _lines(reports)
    scored = [s.values for _, line in lines for s in line]
    protocols = [p for p in PROTOCOLS if any(p.name in values for values in scored)]
    columns = min(len(protocols), COLUMNS)
    rows = -(-len(protocols) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout="constrained")
    for place, protocol in enumerate(protocols, 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw(axes, protocol, reports, lines)
        axes.legend(fontsize=8)
    if path:
        write_figure(figure, path, 150)
        name, several = ROBUSTNESS.name, len(reports) > 1
        damaged = {
            label if several else str(s.subnet): s.values[name]
            for label, line in lines for s in line if name in s.values
        }  # fmt: skip
        if damaged:
            write_figure(curves(damaged), path.with_stem(f"{path.stem}-{name}"), 100)
    return figure


def _lines(reports: Sequence[Report]) -> list[tuple[str, list[SubnetScore]]]:
    """Scores by growing size that are one line, and what it is called."""
    if len(reports) > 1:
        return [(report.settings["run"], report.scores) for report in reports]
    scores = sorted(reports[0].scores, key=lambda s: s.parameters)
    widths = sorted({s.subnet.width for s in scores})
    return [(f"width {width}", [s for s in scores if s.subnet.width == width]) for width in widths]


def _draw(
    axes: Any,
    protocol: Protocol,
    reports: Sequence[Report],
    lines: Sequence[tuple[str, list[SubnetScore]]],
) -> None:
    """Draw a panel."""
    number = protocol.reported in protocol.numbers
    scale, hollow = 1 if number else 100, ""

    def points(line: list[SubnetScore], name: str) -> tuple[list[int], list[float]]:
        there = [s for s in line if name in s.values]
        return [s.parameters for s in there], [scale * protocol.headline(s.values[name]) for s in there]

    for label, line in lines:
        (drawn,) = axes.plot(*points(line, protocol.name), "o-", label=label)
        before = points(line, protocol.before)
        if before[0]:
            hollow = " (hollow: before training)"
            axes.plot(*before, "o:", color=drawn.get_color(), markerfacecolor="white", linewidth=1)
    settings = reports[0].settings
    for style, (kind, scored) in zip(("--", ":"), reports[0].baselines.items(), strict=False):
        if len(reports) == 1 and protocol.name in scored:
            level = scale * protocol.headline(scored[protocol.name])
            axes.axhline(level, color="grey", linewidth=1, linestyle=style, label=f"{kind} {level:.3g}")
    named = protocol.reported if number else f"{protocol.name} {protocol.reported}, %"
    axes.set(xlabel="parameters", ylabel=named, xscale="log")
    data = Path(settings.get(protocol.name, {}).get("folder", settings["data"])).name
    count = sum(len(line) for _, line in lines)
    whose = "" if settings["branch"] == "model" else "One training run, "
    axes.set_title(f"{whose}{count} model{'s' * (count > 1)}: {data}{hollow}", fontsize=10)
    axes.grid(alpha=0.3)
