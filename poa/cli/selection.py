"""The commands `latency` and `select`: their options, and what they do."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.cli.arguments import RUN_HELP, Command, add_subnets, add_weights, number
from poa.config import with_data
from poa.data.layout import SOURCES
from poa.device import choose_device, use_threads
from poa.drawing import require_drawable
from poa.errors import InputError
from poa.evaluate.sweep import data_place
from poa.files import require_json
from poa.selection import RUNTIMES, Candidate, Choice, Cost, LatencyTable, Setting, choose, measure
from poa.selection.choice import plot, size_of, table
from poa.selection.latency import interpolated, require_sample, sampled
from poa.selection.quality import Quality, Weights, agreement_quality, knn_quality

PREFIX = "latency-"
"""How names of files of latency tables begin, beside a run."""


def add_latency(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser(
        "latency", help="measure how long subnets take on this machine, as networks of their own"
    )
    add_subnets(command, default=["all"])
    command.add_argument(
        "--sample",
        type=number(int, "[2, 100000]"),
        metavar="N",
        help="measure N subnets spread over the search space and interpolate the others",
    )
    command.add_argument("--device", default="auto", help="device to measure: auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--threads",
        type=number(int, "[1, 1024]"),
        metavar="N",
        help="CPU threads of PyTorch (default: OMP_NUM_THREADS, or one on a CPU if that is not set)",
    )
    command.add_argument(
        "--batch", type=number(int, "[1, 65536]"), default=1, help="images per call (default: 1)"
    )
    command.add_argument(
        "--image-size", type=number(int, "[1, 4096]"), help="input size in pixels (default: that of the run)"
    )
    command.add_argument(
        "--runtime", choices=tuple(RUNTIMES), default="torch", help="what runs subnets (default: torch)"
    )
    command.add_argument(
        "--seconds",
        type=number(float, "(0, 3600]"),
        default=2.0,
        help="seconds of measuring each subnet (default: 2)",
    )
    command.add_argument("--out", help="JSON file of the table (default: RUN/latency-DEVICE.json)")
    command.set_defaults(command=run_latency)


def run_latency(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    method = folder.config().method
    backbone = method.backbone
    space, device = backbone.space, choose_device(options.device)
    subnets = space.named(options.subnets)
    size = options.image_size or backbone.image_size
    backbone.grid(size)
    if options.sample:
        if options.subnets != ["all"]:
            raise InputError("latency: expected one of --subnets and --sample, got both")
        require_sample(space, options.sample)
        subnets = sampled(space, options.sample)
    use_threads(options.threads, device)
    setting = Setting.of(device, options.batch, size, options.runtime)
    out = Path(options.out or folder.path / f"{PREFIX}{setting.name(backbone.image_size)}.json")
    require_json(out, "--out", "latency")
    if out.exists() and (before := LatencyTable.read(out, space).setting.machine) != setting.machine:
        raise InputError(f"--out: expected a new file for {setting.machine}, got {out}, a table of {before}")
    measured = measure(method, subnets, setting, device, options.seconds)
    if options.sample:
        measured = interpolated(measured, space)
    measured.write(out)
    print(*measured.lines(), out, sep="\n")


def add_select(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("select", help="find the best subnet within budgets, and the Pareto front")
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    for cost, of in (("params", "parameters"), ("flops", "FLOPs of an image's forward")):
        command.add_argument(
            f"--max-{cost}",
            type=number(size_of, "(0, inf)"),
            metavar="N",
            help=f"largest number of {of} allowed, such as 5.5M",
        )
    command.add_argument(
        "--max-ms",
        nargs="+",
        default=[],
        type=_milliseconds,
        metavar="DEVICE=MS",
        help="longest median latency allowed, by a table of poa latency, such as cpu=5; or MS, if there "
        "is one table",
    )
    command.add_argument(
        "--min-knn",
        type=number(float, "[0, 1]"),
        metavar="SHARE",
        help="lowest 20-NN accuracy allowed, such as 0.8; without other budgets the cheapest is chosen",
    )
    command.add_argument(
        "--cost",
        default="params",
        metavar="COST",
        help="cost of the Pareto front without other budgets: params, flops or DEVICE (default: params)",
    )
    command.add_argument(
        "--rank",
        choices=("knn", "agreement"),
        default="knn",
        help="quality: accuracies of poa evaluate, or without labels CKA with the intact network "
        "(default: knn)",
    )
    add_weights(command)
    command.add_argument("--data", help=f"{SOURCES} (default: the data of the run)")
    command.add_argument(
        "--images",
        type=number(int, "[2, 1e9]"),
        default=1000,
        help="largest number of images for --rank agreement (default: 1000)",
    )
    command.add_argument("--device", default="auto", help="device of --rank agreement: auto, cpu or cuda:N")
    command.add_argument("--plot", help="also plot the Pareto front into this picture, such as front.png")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(command=run_select)


def _milliseconds(text: str) -> tuple[str | None, float]:
    """`DEVICE=MS` or `MS`."""
    device, equals, value = text.rpartition("=")
    return device if equals else None, number(float, "(0, inf)")(value)


def run_select(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    config = folder.config()
    if options.min_knn is not None and options.rank != "knn":
        raise InputError("--min-knn: expected --rank knn with it, got --rank agreement")
    if options.plot:
        require_drawable(Path(options.plot), "--plot")
    costs, values, tables = _costs(folder, options)
    weights = Weights(folder, options.branch, options.step)
    if options.rank == "knn":
        data = data_place(options.data) if options.data else None
        quality = knn_quality(weights, data, config.data.source)
    else:
        config = with_data(config, options.data) if options.data else config
        device = choose_device(options.device)
        use_threads(config.performance.threads, device)
        quality = agreement_quality(weights, config, options.images, device)
    space = config.method.backbone.space
    known = [s for s in space if s in quality.values and all(s in column for column in values.values())]
    if not known:
        raise InputError("select: expected a subnet with a latency and an accuracy, got none")
    candidates = [
        Candidate(s, quality.values[s], {title: column[s] for title, column in values.items()}) for s in known
    ]
    choice = choose(candidates, costs, quality.name, quality.shown, options.min_knn)
    if options.plot:
        picture = Path(options.plot)
        title = f"{folder.path.resolve().name}: {len(choice.front)} of {len(known)} subnets on the front"
        plot(choice, picture, quality.unit, quality.scale, title)
    if options.json:
        print(json.dumps(_as_json(choice, quality)))
        return
    print(f"{options.run}: {quality.about}")
    for name, measured in tables.items():
        print(f"{name}: {measured.setting}, median", *measured.notes(), sep="; ")
    if missing := [str(s) for s in space if s not in known]:
        print(f"left out, without an accuracy or a latency: {', '.join(missing)}")
    print(*table(choice, costs, quality.name, quality.shown, quality.notes), sep="\n")
    if options.plot:
        print(options.plot)
    words = ["poa", "extract", options.run, "--subnets", str(choice.best.subnet)]
    words += ["--branch", options.branch] if options.branch != "teacher" else []
    words += ["--step", str(options.step)] if options.step else []
    print(f"next: {shlex.join(words)}")


def _costs(
    folder: RunFolder, options: argparse.Namespace
) -> tuple[list[Cost], dict[str, dict], dict[str, LatencyTable]]:
    """Costs with their limits, their values by subnet, and the latency tables among them by device.

    The cost that the front is about comes first.
    """
    backbone = folder.config().method.backbone
    files = {p.stem.removeprefix(PREFIX): p for p in sorted(folder.path.glob(f"{PREFIX}*.json"))}
    limits: dict[str, float | None] = {}
    for device, limit in options.max_ms:
        limits[_device(device, files, "--max-ms", options.run)] = limit
    if options.cost not in ("params", "flops"):
        limits.setdefault(_device(options.cost, files, "--cost", options.run), None)
    tables = {name: LatencyTable.read(files[name], backbone.space) for name in limits}
    costs = [
        Cost("params", lambda value: f"{value:,.0f}", options.max_params),
        Cost("GFLOPs", lambda value: f"{value:.3g}", options.max_flops and options.max_flops / 1e9),
        *(Cost(f"{name} ms", lambda value: f"{value:.3f}", limit) for name, limit in limits.items()),
    ]
    values = {
        "params": {s: float(backbone.parameters(s)) for s in backbone.space},
        "GFLOPs": {s: backbone.flops(s) / 1e9 for s in backbone.space},
        **{f"{n} ms": {s: x.median for s, x in measured.latencies.items()} for n, measured in tables.items()},
    }
    first = {"params": "params", "flops": "GFLOPs"}.get(options.cost, f"{options.cost} ms")
    return sorted(costs, key=lambda cost: cost.title != first), values, tables


def _device(name: str | None, files: dict[str, Path], option: str, run: str) -> str:
    """The name of a latency table beside the run; that of the only one where none is given."""
    if name is None and len(files) == 1:
        return next(iter(files))
    if name not in files:
        known = f"one of {', '.join(files)}" if files else f"a latency table in {run}"
        got = "none" if not files else "none of them" if name is None else repr(name)
        raise InputError(f"{option}: expected {known}, got {got}; poa latency {run} measures one")
    return name


def _as_json(choice: Choice, quality: Quality) -> dict[str, object]:
    rows = [
        {
            "subnet": str(c.subnet),
            quality.name: c.quality,
            **c.costs,
            "dominated_by": str(choice.dominated[c.subnet]) if c.subnet in choice.dominated else None,
        }
        for c in choice.candidates
    ]
    return {"best": str(choice.best.subnet), "about": quality.about, "subnets": rows}
