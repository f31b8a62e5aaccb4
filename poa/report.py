"""One page about a run: its curves, its figures, its alarms."""

from __future__ import annotations

import html
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from poa.checkpoint import RunFolder
from poa.config import Config
from poa.drawing import require_drawable, write_figure
from poa.errors import InputError
from poa.files import write_text
from poa.metrics import flat
from poa.presets import PRESETS, preset
from poa.subnets import Subnet

Row = Mapping[str, Any]
Band = dict[str, list[tuple[int, float, float]]]  # (step, lowest, highest) of figures by name

EXPECTED = Path(__file__).parent / "expected"
BANDED = ("loss", "knn.", "target_entropy.", "feature_std.")


def write_report(folder: RunFolder, out: Path) -> None:
    """Draw the curves of a run into one HTML page, or one picture.

    Args:
        folder: of the run.
        out: `.html`, or any ending that matplotlib writes.

    Raises:
        InputError: no metrics yet, no matplotlib, an unknown ending, or a place where nothing can be written.
    """
    require_drawable(out, "report", also=".html")
    rows = folder.rows()
    if not any("loss" in row for row in rows):
        raise InputError(f"report: expected metrics in {folder.metrics}, got none yet")
    config = folder.config()
    figure = _draw(rows, expected_band(config))
    if out.suffix == ".html":
        image = io.StringIO()
        figure.savefig(image, format="svg")
        svg = image.getvalue()
        write_text(out, _page(folder, config, rows, svg[svg.index("<svg") :]))
    else:
        write_figure(figure, out, 110)


def record_band(folders: Sequence[RunFolder], out: Path) -> None:
    """Write the range of every figure at every step of several runs, which differ by their seed."""
    runs = [_figures(folder.rows()) for folder in folders]
    band = {
        name: [
            (step, *(float(f"{pick(run[name][step] for run in runs):.4g}") for pick in (min, max)))
            for step in sorted(set.intersection(*(set(run.get(name, ())) for run in runs)))
        ]
        for name in sorted(runs[0])
        if name.startswith(BANDED)
    }
    seeds = [folder.config().method.seed for folder in folders]
    write_text(out, json.dumps({"seeds": seeds, "band": band}, separators=(",", ":")) + "\n")


def expected_band(config: Config) -> Band:
    """What runs of this method usually show; empty where none were recorded."""
    for name in PRESETS:
        file = EXPECTED / f"{name}.json"
        if file.exists() and replace(config.method, seed=0) == replace(preset(name).method, seed=0):
            return json.loads(file.read_text())["band"]
    return {}


def _figures(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Figures by name, then by step."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in flat(row).items():
            found.setdefault(name, {})[row["step"]] = value
    return found


def _draw(rows: Sequence[Row], band: Band) -> Any:
    from matplotlib.figure import Figure  # optional, and slow to import

    figures = _figures(rows)
    figure = Figure(figsize=(13.5, 12.0), layout="constrained")
    axes = figure.subplots(4, 3).ravel()

    def named(*prefixes: str) -> list[str]:
        return [name for name in figures if name.startswith(prefixes)]

    panels: list[tuple[str, list[str], Callable[[str], str]]] = [
        ("loss", ["loss"], str),
        ("DINO loss by student and head", named("intact.dino", "elastic.dino"), str),
        ("iBOT loss by student and head", named("intact.ibot", "elastic.ibot"), str),
        ("distillation by head, KoLeo", named("elastic.distill", "koleo"), str),
        ("20-NN accuracy", [n for n in named("knn.") if n != "knn.k"], lambda n: n.removeprefix("knn.")),
        ("target entropy / ln K by head", named("target_entropy."), lambda n: "head " + n[-1]),
        ("prototypes used by head", named("prototypes_used."), lambda n: "head " + n[-1]),
        ("standard deviation of features", named("feature_std."), lambda n: n.partition(".")[2]),
        ("gradient norms before clipping", named("grad_norm."), lambda n: n.partition(".")[2]),
        ("learning rate", ["lr"], str),
        ("images per second", ["images_per_s"], str),
    ]
    for place, (title, names, label) in zip(axes, panels, strict=False):
        for name in names:
            steps, values = zip(*sorted(figures[name].items()), strict=True)
            (line,) = place.plot(
                steps, values, label=label(name), linewidth=1, marker="." * (len(steps) < 20)
            )
            if name in band and band[name]:
                at, low, high = zip(*band[name], strict=True)
                place.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for row in rows:
            if "alarm" in row:
                place.axvline(row["step"], color="red", linewidth=1)
        place.set_title(title + (" (shaded: usual)" if any(n in band for n in names) else ""), fontsize=10)
        place.grid(alpha=0.3)
        if len(names) > 1:
            place.legend(fontsize=6, ncols=1 + (len(names) > 4))
    for place in (axes[8], axes[9]):
        place.set_yscale("log")
    _draw_subnets(axes[-1], rows)
    for place in axes[-3:-1]:
        place.set_xlabel("step")
    return figure


def _draw_subnets(place: Any, rows: Sequence[Row]) -> None:
    """How often each subnet was the elastic student."""
    counts: Counter[str] = sum((Counter(row["subnets"]) for row in rows if "subnets" in row), Counter())
    names = sorted(counts, key=Subnet.parse)
    place.bar(range(len(names)), [counts[name] for name in names])
    shown = range(0, len(names), max(len(names) // 12, 1))
    place.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=6)
    place.set_title("elastic students drawn", fontsize=10)


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """The figures of a run in words."""
    logged = [row for row in rows if "loss" in row]
    last = logged[-1]
    shown = {
        "steps": f"{last['step']:,}",
        "loss": "NaN" if last["loss"] is None else f"{last['loss']:.4f}",
        "images per second": f"{last['images_per_s']:,.0f}",
        "waiting for data": f"{last['data_wait']:.1%}",
        "skipped steps": str(last["skipped_steps"]),
        "unreadable images": str(last["unreadable"]),
        "peak memory": f"{last['peak_gib']:.2f} GiB",
    }
    if last.get("mfu") is not None:
        shown["MFU"] = f"{last['mfu']:.1%}"
    scores = [row["knn"] for row in rows if "knn" in row]
    if scores:
        best = {k: v for k, v in scores[-1].items() if k != "k"}
        shown["20-NN accuracy"] = ", ".join(f"{name} {score:.1%}" for name, score in best.items())
    return shown


def _page(folder: RunFolder, config: Config, rows: Sequence[Row], svg: str) -> str:
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in summary(rows).items()
    )
    alarms = "".join(
        f"<li>step {row['step']}: <b>{html.escape(row['alarm'])}</b> "
        f"({html.escape(row['figures'])}): {html.escape(row['advice'])}</li>"
        for row in rows
        if "alarm" in row
    )
    name = html.escape(folder.path.resolve().name)
    style = "body{font:14px sans-serif;margin:2em}td{padding:2px 1em 2px 0}svg{max-width:100%;height:auto}"
    return (
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{name}</title><style>{style}</style>"
        f"<h1>{name}</h1><p>Images: {html.escape(config.data.source)}; seed {config.method.seed}.</p>"
        f"<table>{table}</table><h2>Alarms</h2>{f'<ul>{alarms}</ul>' if alarms else '<p>None.</p>'}"
        f"<h2>Curves</h2>{svg}</html>\n"
    )
