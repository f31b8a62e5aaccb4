"""One page about a run, or about several beside each other: curves, figures, alarms, crops, options."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from poa.checkpoint import RunFolder, log
from poa.config import Config
from poa.contact_sheet import contact_sheet
from poa.curves import Band, Row, draw_curves, figures_of
from poa.drawing import require_drawable, require_matplotlib, write_figure
from poa.errors import InputError
from poa.evaluate import number_format, reported
from poa.evaluate.quality import TITLES, spearman
from poa.evaluate.scores import FEWEST
from poa.files import read_json, write_text
from poa.options import describe
from poa.presets import PRESETS, preset
from poa.subnets import Subnet
from poa.table import html_table

PICTURES = ("pictures.html", "prototypes.html")
EXPECTED = Path(__file__).parent / "expected"
BANDED = ("loss", "knn.", "target_entropy.", "feature_std.")
STYLE = (
    "body{font:14px sans-serif;margin:2em}td,th{padding:2px 1em 2px 0;text-align:left}"
    "svg{max-width:100%;height:auto}img{width:100%;max-width:1200px;image-rendering:pixelated}"
)


def write_report(folders: Sequence[RunFolder], out: Path) -> None:
    """Draw the curves of a run, or of several to compare, into one HTML page, or one picture of any kind.
    Raises InputError: no metrics yet, no matplotlib, an unknown ending, or a place where nothing can be
    written."""
    require_drawable(out, "report", also=".html")
    figure = curves_of(folders)
    if out.suffix != ".html":
        write_figure(figure, out, 110)
        return
    image = io.StringIO()
    figure.savefig(image, format="svg")
    svg = image.getvalue()
    write_text(out, _page(folders, svg[svg.index("<svg") :], out.parent))


def curves_of(folders: Sequence[RunFolder]) -> Any:
    """The curves of runs, a figure of matplotlib; of one alone over the range that runs like it have shown.
    Raises InputError: no metrics yet, or no matplotlib."""
    require_matplotlib()
    rows = _rows(folders)
    for folder, logged in zip(folders, rows.values(), strict=True):
        if not any("loss" in row for row in logged):
            raise InputError(f"report: expected metrics in {folder.metrics}, got none yet")
    alone = len(folders) == 1
    band = expected_band(folders[0].config()) if alone else {}
    pairs = zip(folders, rows.values(), strict=True)
    sources = dict.fromkeys(level for folder, logged in pairs for level in _source(folder, logged))
    phases = _beginning(folders[0]).get("phases", {}) if alone else {}
    return draw_curves(rows, band, phases, list(sources))


def _source(folder: RunFolder, rows: Sequence[Row]) -> list[float]:
    """The 20-NN accuracy of the pretrained weights that a run began with, if it was measured."""
    method = folder.config().method
    name = f"knn.teacher {method.backbone.space.intact}"
    before = figures_of(rows).get(name, {})
    return [before[0]] if method.init.weights and 0 in before else []


def _rows(folders: Sequence[RunFolder]) -> dict[str, list[dict[str, Any]]]:
    return {name: folder.rows() for name, folder in zip(_names(folders), folders, strict=True)}


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The names of the folders, or their paths where those are the same."""
    names = [folder.path.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]


def _beginning(folder: RunFolder) -> dict[str, Any]:
    """The first lines of the run and its phases; nothing if they are missing or damaged."""
    with suppress(InputError, AttributeError, KeyError, TypeError, ValueError):
        beginning = read_json(folder.path / "beginning.json", "report: expected the first lines of the run")
        phases = {str(what): int(step) for what, step in beginning["phases"].items()}
        return {"said": list(map(str, beginning["said"])), "phases": phases}
    return {}


def record_band(folders: Sequence[RunFolder], out: Path) -> None:
    """Write the range of every figure at every step of several runs, which differ by their seed."""
    runs = [figures_of(folder.rows()) for folder in folders]
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
    for key, title in TITLES.items():
        if measured := [row for row in rows if key in row]:
            shown[title] = ", ".join(f"{name} {value:.1f}" for name, value in measured[-1][key].items())
            pairs = [(row["knn"][name], value) for row in measured for name, value in row[key].items()]
            if len(pairs) >= FEWEST:
                rank = spearman(*map(list, zip(*pairs, strict=True)))
                shown[title] += f"; Spearman correlation with 20-NN over {len(pairs)} evaluations {rank:.2f}"
    if tops := [row["top1"] for row in rows if "top1" in row]:
        shown["top-1 accuracy"] = ", ".join(f"{name} {score:.1%}" for name, score in tops[-1].items())
    return shown


def _page(folders: Sequence[RunFolder], svg: str, place: Path) -> str:
    rows, alone = _rows(folders), len(folders) == 1
    beginning = _beginning(folders[0]) if alone else {}
    figures = [summary(logged) for logged in rows.values()]
    for folder, logged, run in zip(folders, rows.values(), figures, strict=True):
        for level in _source(folder, logged):
            run["20-NN accuracy of the source"] = f"{level:.1%}"
    shown = list(dict.fromkeys(name for run in figures for name in run))
    alarms = [
        f"<li>{'' if alone else _text(run) + ', '}step {row['step']}: <b>{_text(row['alarm'])}</b> "
        f"({_text(row['figures'])}): {_text(row['advice'])}</li>"
        for run, logged in rows.items()
        for row in logged
        if "alarm" in row
    ]
    title = _text(", ".join(rows))
    marks = ", ".join(f"{what} {step:,}" for what, step in beginning.get("phases", {}).items())
    configs = [folder.config() for folder in folders]
    parts = [
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        html_table([] if alone else ["", *rows], ([n, *(run.get(n, "") for run in figures)] for n in shown)),
        f"<pre>{_text(chr(10).join(beginning.get('said', [])))}</pre>",
        f"<h2>Alarms</h2>{'<ul>' + ''.join(alarms) + '</ul>' if alarms else '<p>None.</p>'}",
        f"<h2>Curves</h2>{f'<p>Dotted: {_text(marks)}.</p>' if marks else ''}{svg}",
        f"<h2>Evaluations</h2>{_evaluations(folders, list(rows))}",
        *_pictures(folders, list(rows), place),
        *([f"<h2>Augmented crops</h2>{_crops(configs[0])}"] if alone else []),
        _options(configs, list(rows)),
    ]
    return "\n".join(parts) + "</html>\n"


def _pictures(folders: Sequence[RunFolder], names: Sequence[str], place: Path) -> Iterator[str]:
    """Links, from a page in `place`, to what `poa pictures` wrote into folders."""
    for name, folder in zip(names, folders, strict=True):
        for page in (folder.path / picture for picture in PICTURES):
            if page.exists():
                link = quote(os.fsencode(os.path.relpath(page.resolve(), place.resolve())))
                yield f"<p><a href='{link}'>{page.stem.capitalize()} of {_text(name)}</a></p>"


def _text(value: object) -> str:
    return html.escape(str(value))


def evaluations(
    folder: RunFolder, scores: Callable[[Mapping[str, Any]], Mapping[str, float]] = reported
) -> dict[str, dict[str, float]]:
    """Accuracies of subnets by their names, of every protocol of every evaluation in a folder.

    `scores` picks those of a row by title; default the one that stands for each protocol.
    """
    columns: dict[str, dict[str, float]] = {}
    for file in sorted(folder.path.glob("evaluation*.json")):
        try:
            evaluation = read_json(file, "evaluation")
            about = "{branch} of step {step}, {data}".format(**evaluation["settings"])
            for row in evaluation["subnets"]:
                name = str(Subnet.parse(row["subnet"]))
                for kind, accuracy in scores(row).items():
                    columns.setdefault(f"{about}: {kind}", {})[name] = float(accuracy)
        except (LookupError, AttributeError, TypeError, ValueError):
            log.warning("%s: expected an evaluation, got a damaged or foreign file; left out", file)
    return columns


def _evaluations(folders: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Accuracies by subnet, of all evaluations in the folders."""
    columns = {
        f"{name}: {about}" if len(names) > 1 else about: scores
        for name, folder in zip(names, folders, strict=True)
        for about, scores in evaluations(folder).items()
    }
    if not columns:
        return "<p>None yet: poa evaluate RUN makes one.</p>"
    subnets = sorted({subnet for scores in columns.values() for subnet in scores}, key=Subnet.parse)
    forms = {name: number_format(name.rpartition(": ")[2]) for name in columns}
    cells = ([s, *(format(c[s], forms[n]) if s in c else "" for n, c in columns.items())] for s in subnets)
    return html_table(["subnet", *columns], cells)


def _crops(config: Config) -> str:
    try:
        picture = base64.b64encode(contact_sheet(config)).decode()
    except InputError as error:
        return f"<p>Not shown: {_text(error)}</p>"
    about = "An image in each row, its two global crops and its local crops, as a step would see them."
    return f"<p>{about}</p><img src='data:image/png;base64,{picture}'>"


def _options(configs: Sequence[Config], names: Sequence[str]) -> str:
    """All options of a run, or those in which several differ."""
    values = [{key: str(value) for key, _, value, _ in describe(config)} for config in configs]
    keys = list(dict.fromkeys(key for run in values for key in run))
    rows = [[key, *(run.get(key, "") for run in values)] for key in keys]
    if len(names) == 1:
        return f"<h2>Options</h2><details><summary>All {len(rows)}</summary>{html_table([], rows)}</details>"
    different = [row for row in rows if len(set(row[1:])) > 1]
    shown = html_table(["", *names], different) if different else "<p>None.</p>"
    return f"<h2>Options that differ</h2>{shown}"
