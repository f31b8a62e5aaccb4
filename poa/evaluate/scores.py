"""Scores of subnets with the settings they depend on: table, JSON and plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poa.errors import InputError
from poa.evaluate.knn import KNN
from poa.evaluate.plots import plot_reports
from poa.evaluate.quality import QUALITY, spearman
from poa.evaluate.suite import PROTOCOLS
from poa.files import read_json, write_json
from poa.subnets import Subnet
from poa.table import Table

FEWEST = 4  # subnets, before a correlation means anything


@dataclass(frozen=True)
class SubnetScore:
    """Size and scores of one subnet.

    `values` has the score of each protocol by its name, and of the weights before training by `before`.
    """

    subnet: Subnet
    parameters: int
    flops: int
    values: Mapping[str, Any]

    def columns(self) -> dict[str, float]:
        """All accuracies by the title of their column."""
        figures: dict[str, float] = {}
        for p in PROTOCOLS:
            if p.name in self.values:
                figures |= p.accuracies(self.values[p.name])
            if p.before in self.values:
                figures[f"{p.reported} init"] = p.headline(self.values[p.before])
        return figures


def reported(values: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy that stands for each protocol, out of scores as in `SubnetScore` or read from JSON."""
    return {p.reported: p.headline(values[p.name]) for p in PROTOCOLS if p.name in values}


def number_format(title: str) -> str:
    """How a figure is written: a share of 1 in per cent."""
    kind = title.removesuffix(" init")
    return ".2f" if any(kind in p.numbers for p in PROTOCOLS) else ".1%"


def accuracies(values: Mapping[str, Any]) -> dict[str, float]:
    """All accuracies of such scores by the titles of their columns."""
    columns_of = [p.accuracies(values[p.name]) for p in PROTOCOLS if p.name in values]
    return {title: accuracy for columns in columns_of for title, accuracy in columns.items()}


@dataclass(frozen=True, repr=False)
class Report:
    """Scores of subnets, with all settings that the numbers depend on, those of features without a network
    by their name, and the files in which they lie; shows itself as a table."""

    scores: list[SubnetScore]
    settings: dict[str, Any]
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        rows = [
            {"subnet": s.subnet, "params": s.parameters, "GFLOPs": s.flops / 1e9, **s.columns()}
            for s in self.scores
        ]
        rows += [{"subnet": kind, **accuracies(values)} for kind, values in self.baselines.items()]
        formats = {title: number_format(title) for title in self.scores[0].columns()}
        return Table(rows, {"params": ",", "GFLOPs": ".3f", **formats})._repr_html_()

    def table(self) -> str:
        """A text table: the settings, then one line per subnet."""
        s, rows = self.settings, [score.columns() for score in self.scores]
        wide = {title: max(6, len(title)) for title in rows[0]}
        lines = [
            f"{s['run']}: {s['branch']}" + (f" of step {s['step']}" if s["step"] else ""),
            f"{s['data']}: {s['bank_images']:,} bank and {s['query_images']:,} query images "
            f"of {s['image_size']} px",
            *(p.described(s[p.name]) for p in PROTOCOLS if p.name in s),
            f"{'subnet':>9} {'params':>11} {'GFLOPs':>8}" + "".join(f"  {t:>{w}}" for t, w in wide.items()),
        ]
        for score, row in zip(self.scores, rows, strict=True):
            line = f"{score.subnet!s:>9} {score.parameters:>11,} {score.flops / 1e9:>8.3f}"
            lines.append(line + "".join(f"  {row[t]:>{w}{number_format(t)}}" for t, w in wide.items()))
        for kind, values in self.baselines.items():
            known = {t: format(value, number_format(t)) for t, value in accuracies(values).items()}
            lines.append(
                f"{kind:>9} {'':>20}" + "".join(f"  {known.get(t, ''):>{w}}" for t, w in wide.items())
            )
        if ranks := self.correlations():
            told = ", ".join(f"{title} {value:.2f}" for title, value in ranks.items())
            lines.append(f"Spearman's correlation with {KNN.reported} over {len(rows)} subnets: {told}")
        return "\n".join(lines)

    def correlations(self) -> dict[str, float]:
        """Rank correlation with k-NN of the figures that need no labels, over the subnets; none of few."""
        return _correlations([score.values for score in self.scores])

    def content(self) -> dict[str, Any]:
        """All of it, as JSON."""
        rows = [
            {
                "subnet": str(s.subnet),
                "width": s.subnet.width,
                "depth": s.subnet.depth,
                "params": s.parameters,
                "flops": s.flops,
                **s.values,
            }
            for s in self.scores
        ]
        return _evaluation(self.settings, rows, self.baselines)

    def write(self, path: Path) -> None:
        """Write JSON; what is there of the same weights and images stays, of other subnets, protocols and
        baselines. Scores of a protocol by other settings do not."""
        write_json(path, _merged(self.content(), _read(path), path))

    def plot(self, path: Path | None = None) -> Any:
        """As `plot_reports`."""
        return plot_reports([self], path)


def _correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """As `Report.correlations`, of the scores of subnets; those without such figures do not count."""
    known = [accuracies(values) for values in rows if QUALITY.name in values]
    if len(known) < FEWEST:
        return {}
    knn = [row[KNN.reported] for row in known]
    return {title: spearman([row[title] for row in known], knn) for title in QUALITY.numbers}


def _evaluation(
    settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Any]
) -> dict[str, Any]:
    """An evaluation as JSON."""
    ranks = {"correlations": found} if (found := _correlations(rows)) else {}
    lower = {"baselines": dict(baselines)} if baselines else {}
    return {"settings": dict(settings), "subnets": list(rows), **lower, **ranks}


def write_models(reports: Sequence[Report], path: Path) -> None:
    """Write those of several models as a list `models` of JSON; each as `Report.write`, those of others there
    stay."""
    there: dict[str, Any] = {}
    with suppress(LookupError, TypeError, AttributeError):
        there = {model["settings"]["run"]: model for model in _read(path)["models"]}
    places = [report.settings["run"] for report in reports]
    merged = [
        _merged(report.content(), there.pop(place, {}), path)
        for place, report in zip(places, reports, strict=True)
    ]
    write_json(path, {"models": [*merged, *there.values()]})


def _read(path: Path) -> dict[str, Any]:
    """Scores in a file; none where it is another one, or there is none."""
    with suppress(InputError):
        return read_json(path, "evaluation")
    return {}


def _merged(content: dict[str, Any], there: dict[str, Any], path: Path) -> dict[str, Any]:
    """An evaluation as JSON, with what it does not replace in one of the same weights and images in a file.

    A file in the folder of the run is of this run, wherever that lay.
    """
    with suppress(LookupError, TypeError, AttributeError):  # nothing there, or something else
        now = json.loads(json.dumps(content))
        before, settings = there["settings"], now["settings"]
        if os.path.realpath(path.parent) == os.path.realpath(settings["run"]):
            before["run"] = settings["run"]
        other = {key for key in before.keys() & settings.keys() if before[key] != settings[key]}
        if other - {p.name for p in PROTOCOLS}:
            return content
        gone = {key for p in PROTOCOLS if p.name in other for key in (p.name, p.before)}

        def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
            kept = {row: {key: v for key, v in old[row].items() if key not in gone} for row in old}
            return {row: {**kept.get(row, {}), **new.get(row, {})} for row in {**kept, **new}}

        before_rows, rows = ({row["subnet"]: row for row in x["subnets"]} for x in (there, now))
        baselines = joined(there.get("baselines", {}), now.get("baselines", {}))
        return _evaluation(before | settings, list(joined(before_rows, rows).values()), baselines)
    return content
