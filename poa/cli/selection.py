"""The commands `latency` and `select`: their options, and what they do."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from poa.cli.arguments import RUN_HELP, Command, add_subnets, add_weights, number, values
from poa.data.layout import SOURCES
from poa.drawing import require_drawable
from poa.run import Run
from poa.selection.choice import size_of
from poa.selection.runtimes import RUNTIMES


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
    names = ("sample", "device", "threads", "batch", "image_size", "runtime", "seconds", "out")
    table = Run(options.run).latency(options.subnets, **values(options, *names))
    print(table, table.file, sep="\n")


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
