"""Curves of runs, drawn by matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from poa.evaluate.quality import TITLES
from poa.subnets import Subnet
from poa.writers import flat

Row = Mapping[str, Any]
GRADIENTS, RATE = "gradient norms before clipping", "learning rate"
LOGARITHMIC = (GRADIENTS, RATE)
Band = dict[str, list[tuple[int, float, float]]]  # (step, lowest, highest) of figures by name


def figures_of(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Figures by name, then by step."""
    figures: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in flat(row).items():
            figures.setdefault(name, {})[row["step"]] = value
    return figures


def draw_curves(
    runs: Mapping[str, Sequence[Row]], band: Band, phases: Mapping[str, int], sources: Sequence[float] = ()
) -> Any:
    """A figure of a panel each for what the metrics tell; of several runs, a panel shows the first figure of
    each.

    The usual range of figures is shaded; steps at which phases begin or end are dotted; 20-NN accuracies of
    pretrained `sources` are dashed lines.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    of_run = {run: figures_of(rows) for run, rows in runs.items()}
    known = list(dict.fromkeys(name for figures in of_run.values() for name in figures))
    figure = Figure(figsize=(13.5, 15.0), layout="constrained")
    axes = figure.subplots(5, 3).ravel()

    def named(*prefixes: str) -> list[str]:
        return [name for name in known if name.startswith(prefixes)]

    panels: list[tuple[str, list[str], Callable[[str], str]]] = [
        ("loss", ["loss"], str),
        ("DINO loss by student and head", named("intact.dino", "elastic.dino"), str),
        ("iBOT loss by student and head", named("intact.ibot", "elastic.ibot"), str),
        ("distillation by head, KoLeo", named("elastic.distill", "koleo"), str),
        ("20-NN accuracy", named("knn.teacher", "knn.student"), lambda n: n.removeprefix("knn.")),
        *(
            (f"{title} of class tokens", named(f"{key}."), lambda n: n.partition(".")[2])
            for key, title in TITLES.items()
        ),
        ("target entropy / ln K by head", named("target_entropy."), lambda n: "head " + n[-1]),
        ("prototypes used by head", named("prototypes_used."), lambda n: "head " + n[-1]),
        ("standard deviation of features", named("feature_std."), lambda n: n.partition(".")[2]),
        (GRADIENTS, named("grad_norm."), lambda n: n.partition(".")[2]),
        (RATE, ["lr"], str),
        ("images per second", ["images_per_s"], str),
        ("top-1 accuracy of classifiers", named("top1."), lambda n: n.removeprefix("top1.")),
    ]
    for place, (title, names, label) in zip(axes, panels, strict=False):
        _draw_lines(place, of_run, names, label, band)
        for step in (row["step"] for rows in runs.values() for row in rows if "alarm" in row):
            place.axvline(step, color="red", linewidth=1)
        for step in phases.values():
            place.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        which = f": {label(names[0])}" if len(runs) > 1 and len(names) > 1 else ""
        usual = " (shaded: usual)" if any(name in band for name in names) else ""
        place.set_title(title + which + usual, fontsize=10)
        place.grid(alpha=0.3)
        if title in LOGARITHMIC:
            place.set_yscale("log")
    for level in sources:
        axes[4].axhline(level, color="black", linewidth=1, linestyle="--")
    if sources:
        axes[4].set_title(f"{axes[4].get_title()} (dashed: source)", fontsize=10)
    axes[-2].set_axis_off()
    _draw_subnets(axes[-1], [row for rows in runs.values() for row in rows])
    for place in axes[-5:-2]:
        place.set_xlabel("step")
    return figure


def _draw_lines(
    place: Any,
    of_run: Mapping[str, Mapping[str, Mapping[int, float]]],
    names: Sequence[str],
    label: Callable[[str], str],
    band: Band,
) -> None:
    """Figures of one run, or the first figure of each of several, with their usual range and a legend."""
    alone = len(of_run) == 1
    shown = [(run, name) for run in of_run for name in (names if alone else names[:1])]
    for run, name in shown:
        if name not in of_run[run]:
            continue
        steps, values = zip(*sorted(of_run[run][name].items()), strict=True)
        marker = "." * (len(steps) < 20)
        (line,) = place.plot(steps, values, label=label(name) if alone else run, linewidth=1, marker=marker)
        if band.get(name):
            at, low, high = zip(*band[name], strict=True)
            place.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if len(shown) > 1:
        place.legend(fontsize=6, ncols=1 + (len(shown) > 4))


def _draw_subnets(place: Any, rows: Sequence[Row]) -> None:
    """How often each subnet was the elastic student."""
    counts: Counter[str] = sum((Counter(row["subnets"]) for row in rows if "subnets" in row), Counter())
    names = sorted(counts, key=Subnet.parse)
    place.bar(range(len(names)), [counts[name] for name in names])
    shown = range(0, len(names), max(len(names) // 12, 1))
    place.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=6)
    place.set_title("elastic students drawn", fontsize=10)
