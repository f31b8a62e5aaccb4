"""The commands `latency` and `select`: their options, and what they do."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from poa.cli.arguments import (
    RUN_HELP,
    Command,
    add_subnets,
    add_threads,
    add_weights,
    number,
    values,
)
from poa.data.layout import SOURCES
from poa.drawing import require_drawable
from poa.run import Run
from poa.selection.choice import size_of
from poa.selection.runtimes import RUNTIMES


def add_latency(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("latency", help="measure how long subnets take on this machine")
    add_subnets(command, default=["all"])
    command.add_number(
        "--sample", int, "[2, 1e5]", "measure N subnets and interpolate the others", metavar="N"
    )
    command.add_argument("--device", default="auto", help="device to measure: auto, cpu, cuda or cuda:N")
    add_threads(command)
    command.add_number("--batch", int, "[1, 65536]", "images per call", default=1)
    command.add_number("--image-size", int, "[1, 4096]", "input size in pixels (default: that of the run)")
    command.add_argument(
        "--runtime", choices=tuple(RUNTIMES), default="torch", help="what runs subnets (default: torch)"
    )
    command.add_number("--seconds", float, "(0, 3600]", "seconds of measuring each subnet", default=2.0)
    command.add_argument("--out", help="JSON file of the table (default: RUN/latency-DEVICE.json)")
    command.set_defaults(command=run_latency)


def run_latency(options: argparse.Namespace) -> None:
    names = ("sample", "device", "threads", "batch", "image_size", "runtime", "seconds", "out")
    table = Run(options.run).latency(options.subnets, **values(options, *names))
    print(table, table.file, sep="\n")


def add_select(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("select", help="find the best subnet within budgets, and the Pareto front")
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    for cost, of in (("params", "parameters"), ("flops", "FLOPs per image")):
        command.add_number(
            f"--max-{cost}", size_of, "(0, inf)", f"most {of} allowed, such as 5.5M", metavar="N"
        )
    command.add_argument(
        "--max-ms",
        nargs="+",
        default=[],
        type=_milliseconds,
        metavar="DEVICE=MS",
        help="longest median latency, by a table of poa latency, such as cpu=5; or MS of the only one",
    )
    command.add_number(
        "--min-knn", float, "[0, 1]", "lowest 20-NN accuracy; alone, picks the cheapest", metavar="SHARE"
    )
    command.add_argument(
        "--cost",
        default="params",
        metavar="COST",
        help="cost of the Pareto front without budgets: params, flops or DEVICE (default: params)",
    )
    command.add_argument(
        "--rank",
        choices=("knn", "agreement"),
        default="knn",
        help="quality: knn of poa evaluate, or CKA with the intact network without labels (default: knn)",
    )
    add_weights(command)
    command.add_argument("--data", help=f"{SOURCES} (default: the data of the run)")
    command.add_number("--images", int, "[2, 1e9]", "most images for --rank agreement", default=1000)
    command.add_argument("--device", default="auto", help="device of --rank agreement: auto, cpu or cuda:N")
    command.add_argument("--plot", help="also plot the Pareto front into this picture, such as front.png")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(command=run_select)


def _milliseconds(text: str) -> tuple[str | None, float]:
    """`DEVICE=MS` or `MS`."""
    device, equals, value = text.rpartition("=")
    return device if equals else None, number(float, "(0, inf)")(value)


def run_select(options: argparse.Namespace) -> None:
    if options.plot:
        require_drawable(Path(options.plot), "--plot")
    names = ("rank", "cost", "branch", "step", "images", "device", "max_params", "max_flops", "min_knn")
    given = values(options, *names) | {"max_ms": dict(options.max_ms)}
    selection = Run(options.run).select(options.data, **given)
    if options.plot:
        selection.plot(options.plot)
    if options.json:
        about = {"best": selection.best, "about": selection.quality.about}
        print(json.dumps(about | {"subnets": selection.rows()}))
        return
    print(selection)
    if options.plot:
        print(options.plot)
    words = ["poa", "extract", options.run, "--subnets", selection.best]
    words += ["--branch", options.branch] if options.branch != "teacher" else []
    words += ["--step", str(options.step)] if options.step else []
    print(f"next: {shlex.join(words)}")
