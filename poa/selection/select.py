"""Questions about a run's subnets, answered from what lies beside it: what each costs, which is the best."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from poa.checkpoint import RunFolder
from poa.device import choose_device, use_threads
from poa.drawing import require_matplotlib, write_figure
from poa.errors import InputError
from poa.files import require_json
from poa.selection.choice import Candidate, Choice, Cost, choose, figure_of
from poa.selection.latency import LatencyTable, Setting, interpolated, measure, require_sample, sampled
from poa.selection.quality import Quality
from poa.subnets import Subnet
from poa.table import Table

PREFIX = "latency-"
"""How names of files of latency tables begin, beside a run."""


@dataclass(frozen=True)
class Budgets:
    """What a subnet may cost at most, and must be worth at least; None where that is free.

    Attributes:
        max_params: parameters.
        max_flops: FLOPs of an image's forward.
        max_ms: median latency in milliseconds by name of a latency table beside the run, such as `cpu`; None,
            or a number alone, stands for the only table.
        min_knn: 20-NN accuracy, 0..1.
    """

    max_params: float | None = None
    max_flops: float | None = None
    max_ms: float | Mapping[str | None, float] | None = None
    min_knn: float | None = None

    @classmethod
    def of(cls, budgets: Mapping[str, Any]) -> Budgets:
        """Those of these names. Raises InputError: a name is none of a budget, or a value no number."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in budgets if name not in known]:
            raise InputError(f"select: expected budgets {', '.join(known)}, got {', '.join(unknown)}")
        for name, value in budgets.items():
            for one in value.values() if isinstance(value, Mapping) else [value]:
                if one is not None and (isinstance(one, bool) or not isinstance(one, int | float)):
                    raise InputError(f"{name}: expected a number, got {one!r}")
        return cls(**budgets)

    @property
    def by_table(self) -> Mapping[str | None, float]:
        """`max_ms` of each table."""
        limits = self.max_ms
        return limits if isinstance(limits, Mapping) else {} if limits is None else {None: limits}


@dataclass(frozen=True, repr=False)
class Selection:
    """The best subnet of a run within budgets, and the others; shows itself as a table.

    Attributes:
        costs: what subnets cost, that of the Pareto front first.
        tables: the latency tables among the costs.
        left_out: subnets without a latency or an accuracy.
    """

    run: Path
    choice: Choice
    costs: Sequence[Cost]
    quality: Quality
    tables: Mapping[str, LatencyTable]
    left_out: Sequence[Subnet]

    @property
    def best(self) -> str:
        """Name of the best subnet."""
        return str(self.choice.best.subnet)

    @property
    def front(self) -> list[str]:
        """Names of the subnets that no other beats."""
        return [str(candidate.subnet) for candidate in self.choice.front]

    def rows(self) -> Table:
        """A row for each subnet: its costs, its quality, and which one dominates it."""
        quality, rows = self.quality, []
        for c in self.choice.candidates:
            row = {"subnet": str(c.subnet), **{cost.title: c.costs[cost.title] for cost in self.costs}}
            row[quality.name] = c.quality
            if c.subnet in quality.notes:
                row[quality.noted] = quality.notes[c.subnet]
            by = self.choice.dominated.get(c.subnet)
            rows.append(row | {"dominated_by": by and str(by)})
        forms = {cost.title: cost.form for cost in self.costs} | {quality.name: quality.form}
        return Table(rows, forms | {quality.noted: ".1f"})

    def about(self) -> list[str]:
        """Where qualities and latencies come from, and what is left out, a line each."""
        lines = [f"{self.run}: {self.quality.about}"]
        for name, table in self.tables.items():
            lines.append("\n".join([f"{name}: {table.setting}, median", *table.notes()]))
        if self.left_out:
            names = ", ".join(map(str, self.left_out))
            lines.append(f"left out, without an accuracy or a latency: {names}")
        return lines

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the quality against each cost with a budget; also into a picture, whose ending chooses the
        format.

        Returns a figure of matplotlib.
        """
        require_matplotlib()
        choice, quality = self.choice, self.quality
        title = (
            f"{self.run.resolve().name}: {len(choice.front)} of {len(choice.candidates)} subnets on the front"
        )
        figure = figure_of(choice, quality.unit, quality.scale, title)
        if path:
            write_figure(figure, Path(path), 150)
        return figure

    def __repr__(self) -> str:
        return "\n".join([*self.about(), repr(self._shown())])

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in self.about()) + self._shown()._repr_html_()

    def _shown(self) -> Table:
        """The rows, with whether a subnet is the best, on the front, or over a budget."""
        rows, choice = self.rows(), self.choice
        for row, c in zip(rows, choice.candidates, strict=True):
            by = row.pop("dominated_by")
            over = [k.title for k in choice.axes if k.limit is not None and c.costs[k.title] > k.limit]
            place = ["<- best"] * (str(c.subnet) == self.best)
            place.append(f"dominated by {by}" if by else "Pareto front")
            row[""] = ", ".join([*place, *(f"over the budget of {title}" for title in over)])
        return rows


class Known(NamedTuple):
    """Costs, that of the Pareto front first; their values by title and subnet; latency tables by name."""

    costs: list[Cost]
    values: dict[str, Mapping[Subnet, float]]
    tables: dict[str, LatencyTable]


def known_costs(folder: RunFolder, budgets: Budgets, cost: str) -> Known:
    """What the subnets of a run cost, with the budgets as limits.

    Where no cost has one, the Pareto front is about `cost`: params, flops or the name of a latency table.
    Raises InputError: a latency table is missing.
    """
    backbone = folder.config().method.backbone
    space = backbone.space
    files = {p.stem.removeprefix(PREFIX): p for p in sorted(folder.path.glob(f"{PREFIX}*.json"))}
    limits: dict[str, float | None] = {
        _table(name, files, "--max-ms", folder): limit for name, limit in budgets.by_table.items()
    }
    if cost not in ("params", "flops"):
        limits.setdefault(_table(cost, files, "--cost", folder), None)
    tables = {name: LatencyTable.read(files[name], space) for name in limits}
    costs = [
        Cost("params", ",.0f", budgets.max_params),
        Cost("GFLOPs", ".3g", budgets.max_flops and budgets.max_flops / 1e9),
        *(Cost(f"{name} ms", ".3f", limit) for name, limit in limits.items()),
    ]
    first = {"params": "params", "flops": "GFLOPs"}.get(cost, f"{cost} ms")
    values: dict[str, Mapping[Subnet, float]] = {
        "params": {s: float(backbone.parameters(s)) for s in space},
        "GFLOPs": {s: backbone.flops(s) / 1e9 for s in space},
        **{f"{name} ms": {s: x.median for s, x in t.latencies.items()} for name, t in tables.items()},
    }
    return Known(sorted(costs, key=lambda one: one.title != first), values, tables)


def select(folder: RunFolder, quality: Quality, known: Known, least: float | None) -> Selection:
    """The best subnet of a run by what subnets are worth (at `least` so much) and what they cost. Raises
    InputError: no subnet is within the budgets."""
    space, (costs, values, tables) = folder.config().method.backbone.space, known
    complete = [s for s in space if s in quality.values and all(s in column for column in values.values())]
    if not complete:
        raise InputError("select: expected a subnet with a latency and an accuracy, got none")
    candidates = [
        Candidate(s, quality.values[s], {title: column[s] for title, column in values.items()})
        for s in complete
    ]
    choice = choose(candidates, costs, quality.name, quality.form, least)
    return Selection(folder.path, choice, costs, quality, tables, [s for s in space if s not in complete])


def _table(name: str | None, files: Mapping[str, Path], option: str, folder: RunFolder) -> str:
    """The name of a latency table beside the run; that of the only one where none is given."""
    if name is None and len(files) == 1:
        return next(iter(files))
    if name is None or name not in files:
        run = shlex.quote(str(folder.path))
        names = [*(("params", "flops") if option == "--cost" else ()), *files]
        known = f"one of {', '.join(names)}" if names else f"a latency table in {run}"
        got = "none" if not names else "none of them" if name is None else repr(name)
        raise InputError(f"{option}: expected {known}, got {got}; poa latency {run} measures one")
    return name


def measure_run(
    folder: RunFolder,
    subnets: Sequence[str],
    sample: int | None,
    device: str,
    *,
    threads: int | None,
    batch: int,
    image_size: int | None,
    runtime: str,
    seconds: float,
    out: Path | None,
) -> LatencyTable:
    """Measure the latency of a run's subnets, and write the table beside it; see `poa.Run.latency`."""
    method = folder.config().method
    backbone, where = method.backbone, choose_device(device)
    space, size = backbone.space, image_size or backbone.image_size
    names = space.named(subnets)
    backbone.grid(size)
    if sample:
        if list(subnets) != ["all"]:
            raise InputError("latency: expected one of --subnets and --sample, got both")
        require_sample(space, sample)
        names = sampled(space, sample)
    use_threads(threads, where)
    setting = Setting.of(where, batch, size, runtime)
    out = out or folder.path / f"{PREFIX}{setting.name(backbone.image_size)}.json"
    require_json(out, "--out", "latency")
    if out.exists() and (before := LatencyTable.read(out, space).setting.machine) != setting.machine:
        raise InputError(f"--out: expected a new file for {setting.machine}, got {out}, a table of {before}")
    measured = measure(method, names, setting, where, seconds)
    return (interpolated(measured, space) if sample else measured).write(out)
