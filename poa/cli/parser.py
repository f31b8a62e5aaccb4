"""The options of the command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import get_args, get_type_hints

import torch

import poa
from poa.backbones import CONFIGS
from poa.cli import commands
from poa.cli.arguments import (
    RUN_HELP,
    Command,
    Parser,
    add_overrides,
    add_subnets,
    add_weights,
    describe_commands,
    described,
    number,
    parse_anywhere,
)
from poa.cli.data_check import add_data
from poa.cli.embedding import add_embed, add_pairs, add_pictures
from poa.cli.finetune import add_finetune
from poa.cli.selection import add_latency, add_select
from poa.config import Config, InitConfig
from poa.data.layout import SOURCES
from poa.evaluate import PROTOCOLS
from poa.evaluate.suite import STANDARD
from poa.export.formats import DTYPES
from poa.options import describe, nearest
from poa.presets import PRESETS, QUICKSTARTS, preset


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    options, unknown = parse_anywhere(_parser(arguments), arguments)
    if unknown:
        after = [*arguments, ""][list(arguments).index(unknown[0]) + 1]
        options.parser.error(f"unrecognized argument {unknown[0]}{_meant(unknown[0], after, options)}")
    if named := next((word for word in getattr(options, "overrides", ()) if word in PRESETS), None):
        options.parser.error(f"unrecognized argument {named}; did you mean --preset {named}?")
    return options


def _meant(word: str, after: str, options: argparse.Namespace) -> str:
    """What to write instead of an unknown argument: a flag of the command, or an option of the run."""
    name, _, value = (word if "=" in word else f"{word}={after}").lstrip("-").partition("=")
    flags = [flag for flag in options.parser.flags if flag.startswith("--")]
    if close := difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.8):
        return f"; did you mean {close[0]}?"
    if not hasattr(options, "overrides") or not word.startswith("--"):
        return ""
    key = nearest(name, [key for key, *_ in describe(Config())])
    example = f"did you mean {key}={value or 'VALUE'}?" if key else "--help lists them"
    return f"; options of a run are written KEY=VALUE, without dashes: {example}"


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="poa", description="Pre-train once, for models of all sizes.")
    version = f"poa {poa.__version__}, PyTorch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    group = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    _add_first(group)
    add_data(group)
    _add_planning(group)
    _add_pretrain(group, arguments)
    add_finetune(group)
    _add_queries(group)
    describe_commands(group)
    return parser


def _add_preset(command: Command) -> None:
    command.add_argument("--preset", help="preset whose options are used (default: quickstart)")


def _add_init(command: Command, other: str = "") -> None:
    command.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="initial weights, whose backbone is used: timm:NAME, the folder of a model or a run, or a file "
        f"(method.init.weights){other}",
    )


def _add_first(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("quickstart", help="pre-train on digits, extract and evaluate all subnets")
    command.add_argument(
        "--backbone", choices=tuple(QUICKSTARTS), default="vit", help="backbone to train (default: vit)"
    )
    command.add_argument("--out", help="new run folder (default: runs/PRESET, or runs/PRESET-2, ...)")
    command.add_argument("--device", help="device to train on: auto, cpu, cuda or cuda:N")
    add_overrides(command)
    command.set_defaults(command=commands.run_quickstart)

    command = group.add_parser("subnets", help="list the subnets of a run or a preset with their sizes")
    command.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
    command.add_argument("--preset", help="preset instead of a run: " + ", ".join(PRESETS))
    command.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    command.set_defaults(command=commands.list_subnets, config=None, overrides=[])


def _add_planning(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("memory", help="predict the GPU memory of a training step, without a GPU")
    _add_preset(command)
    _add_init(command)
    add_overrides(command)
    command.set_defaults(command=commands.run_memory, config=None, data=None)

    command = group.add_parser("warmup", help="compile all kernels of a run before it starts")
    _add_preset(command)
    _add_init(command)
    add_overrides(command)
    command.add_argument(
        "--arch", metavar="sm_90", help="compile for an absent GPU architecture such as sm_90, into --cache"
    )
    command.add_argument(
        "--cache",
        metavar="DIR",
        default="triton-cache",
        help="folder of the kernels compiled with --arch (default: %(default)s)",
    )
    command.add_argument(
        "--triton-key",
        metavar="KEY",
        help="key of Triton on the machine with the GPU, needed if its Python version differs; "
        "python -c 'from triton.runtime.cache import triton_key as k; print(k())' prints it there",
    )
    command.set_defaults(command=commands.run_warmup, config=None, data=None)

    command = group.add_parser("loader", help="measure how fast images are read and decoded without training")
    command.add_argument("--data", required=True, help=SOURCES)
    _add_preset(command)
    command.add_argument(
        "--workers",
        type=number(int, "[0, 1024]"),
        nargs="+",
        default=[1],
        help="numbers of decoding processes to try (default: 1)",
    )
    command.add_number("--seconds", float, "(0, 3600]", "seconds per measurement", default=10.0)
    command.set_defaults(command=commands.run_loader, config=None, overrides=[])


def _add_pretrain(group: argparse._SubParsersAction[Command], arguments: Sequence[str]) -> None:
    """`pretrain`, whose help lists every option with the values of the preset in use."""
    longest = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:<{longest}} {text}" for name, (_, text) in PRESETS.items())
    command = group.add_parser(
        "pretrain",
        help="pre-train: one run whose weights hold all subnets of a preset",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Pre-train on one device, or on many with torchrun.\n\npresets:\n{presets}",
        epilog=_options_help(arguments) if {"-h", "--help"} & set(arguments) else None,
    )
    _add_preset(command)
    command.add_argument("--config", help="config.json of another run, instead of a preset")
    command.add_argument("--data", help=f"{SOURCES} (data.source)")
    command.add_argument("--out", help="new run folder")
    command.add_argument("--resume", metavar="RUN", help="resume this run from its newest checkpoint")
    command.add_argument(
        "--replan", action="store_true", help="with --resume: allow other method.optim options"
    )
    _add_init(command, "; without --preset the options of the run or those of preset elastic are used")
    command.add_argument(
        "--teacher",
        metavar="WEIGHTS",
        help="another, frozen teacher, as --init names weights, whose similarities of images are followed "
        "(method.teacher.frozen; sets method.loss.features=1 where it is 0)",
    )
    command.add_argument(
        "--importance",
        choices=get_args(get_type_hints(InitConfig)["importance"]),
        help="with --init: order of channels, heads and blocks (method.init.importance)",
    )
    command.add_argument(
        "--check", action="store_true", help="print what was found and what the run would do, and stop"
    )
    command.add_argument("--auto-resume", action="store_true", help="resume the run in --out if there is one")
    command.add_argument("--device", help="device to train on: auto, cpu, cuda or cuda:N (run.device)")
    add_overrides(command, "any option listed below, such as method.batch_size=32")
    command.set_defaults(command=commands.run_pretrain)


def _options_help(arguments: Sequence[str]) -> str:
    """Every option with its type, value and meaning."""
    names = [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--preset"]
    name = names[-1] if names and names[-1] in PRESETS else "quickstart"
    config = preset(name)
    lines = [f"options, with the values of preset {name}:", *described(config)]
    for other in CONFIGS:
        if not isinstance(config.method.backbone, other):
            lines.append(f"\noptions of method.backbone.kind={other.kind}, with their defaults:")
            lines += described(other(), "method.backbone")
    return "\n".join(lines)


def _add_queries(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser(
        "report", help="write a page with the curves and figures of a run, or a comparison of several runs"
    )
    command.add_argument("run", nargs="+", metavar="RUN", help=RUN_HELP)
    command.add_argument(
        "--out",
        help="page (.html) or picture (.png, ...); default: RUN/report.html, of several RUN/comparison.html",
    )
    command.add_argument(
        "--record", metavar="FILE", help="write the range of figures of several runs to this JSON file"
    )
    command.set_defaults(command=commands.run_report)
    _add_evaluate(group)
    add_latency(group)
    add_select(group)
    _add_extract(group)
    add_embed(group)
    add_pairs(group)
    add_pictures(group)


def _add_evaluate(group: argparse._SubParsersAction[Command]) -> None:
    names = ", ".join(protocol.name for protocol in PROTOCOLS)
    owned = [(p.name, p.folder.options) for p in PROTOCOLS if p.folder]
    parts = ["\n".join([f"options of --{name}:", *described(options)]) for name, options in owned]
    command = group.add_parser(
        "evaluate",
        help=f"measure the accuracy of subnets on held-out images: {names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n\n".join(parts),
    )
    known = "run, or one or more extracted models and timm:NAME of timm's models"
    add_subnets(command, known, "+", default=["all"])
    add_weights(command)
    command.add_argument("--data", help=f"{SOURCES} (default: the data of the run)")
    command.add_argument("--initial", action="store_true", help="also evaluate the initial weights")
    command.add_argument(
        "--baselines", action="store_true", help="also score raw pixels, and histograms of their values"
    )
    for protocol in PROTOCOLS:
        if protocol.folder:
            command.add_argument(
                f"--{protocol.name}", nargs="+", metavar=("FOLDER", "KEY=VALUE"), help=protocol.help
            )
        elif protocol.help:
            command.add_argument(f"--{protocol.name}", action="store_true", help=protocol.help)
    command.add_argument("--suite", choices=(STANDARD,), help="standard: all protocols that are installed")
    command.add_argument(
        "--out",
        help="JSON file (default: evaluation.json beside the weights, of other data evaluation-2.json)",
    )
    command.add_argument("--plot", help="also plot accuracy against size to this file, such as accuracy.png")
    command.add_argument("--device", default="auto", help="device to compute on: auto, cpu, cuda or cuda:N")
    command.set_defaults(command=commands.run_evaluate)


def _add_extract(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("extract", help="export subnets as model folders, which timm reads, too")
    add_subnets(command, required=True)
    add_weights(command)
    command.add_argument("--out", help="folder of the models (default: RUN/models)")
    command.add_number(
        "--image-size", int, "[1, 4096]", "input size in pixels; position embeddings are interpolated to it"
    )
    command.add_argument(
        "--format",
        choices=("timm", "onnx", "pt2"),
        default="timm",
        help="file to write into each folder, too: onnx, or pt2 of torch.export (default: timm, none)",
    )
    command.add_argument(
        "--dtype",
        choices=(*DTYPES, "int8"),
        help="dtype of the file; int8 of onnx is quantised with training images and scored (default: fp32)",
    )
    command.add_argument("--license", default="other", help="licence of the weights, such as apache-2.0")
    command.add_argument(
        "--push",
        metavar="USER/NAME",
        help="upload the model to this repository of the Hugging Face Hub, private if new",
    )
    command.add_argument("--dry-run", action="store_true", help="with --push: print what would be uploaded")
    command.set_defaults(command=commands.run_extract)
