"""The command line: `python -m poa pretrain | report | evaluate | extract | ...`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from poa.backbones import CONFIGS
from poa.checkpoint import RunFolder
from poa.config import PRESETS, Config, preset, with_run
from poa.data.sources import open_data
from poa.data.speed import loader_speed
from poa.distributed import world
from poa.errors import DivergenceError, InputError, PeerError, Preempted, SaveError
from poa.evaluate import evaluate_subnets
from poa.export import extract
from poa.memory import memory_report
from poa.options import describe, differences, from_dict, override
from poa.quickstart import quickstart
from poa.report import record_band, require_matplotlib, write_report
from poa.signals import INTERRUPTED
from poa.step import initial_network
from poa.subnets import SearchSpace, Subnet
from poa.train import pretrain
from poa.warmup import warm_up

QUICKSTARTS = {"vit": "quickstart", "swin": "quickstart-swin", "resnet": "quickstart-resnet"}
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what ends it early is one line on standard error.

    Exit codes: 2 for wrong input, 1 where training cannot go on, 75 where a signal stopped a run that was
    saved and can go on, 130 where Ctrl-C did (a second one leaves at once).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except InputError as error:
        # An error raised in a decoding process arrives with its traceback; the last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix("poa.errors.InputError: ")
        print(f"poa: error: {line}", file=sys.stderr)
        return 2
    except (DivergenceError, PeerError, SaveError) as error:
        print(f"poa: error: {error}", file=sys.stderr)
        return 1
    except Preempted as stop:
        print(f"poa: {stop}", file=sys.stderr)
        return INTERRUPTED if stop.interrupted else REQUEUE
    except KeyboardInterrupt:
        print("poa: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on, as in `| head`
        return 141
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command; `KEY=VALUE` may stand anywhere among its options."""
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _pretrain(options: argparse.Namespace) -> None:
    if options.resume:
        if options.preset or options.config or options.out or options.auto_resume or options.init_from:
            raise InputError(
                "--resume: expected no --preset, --config, --init-from, --out or --auto-resume beside it"
            )
        folder = RunFolder(Path(options.resume))
        config = _overridden(folder.config(), options)
        changed = next(differences(config.method.optim, folder.config().method.optim), None)
        if changed and not options.replan:
            raise InputError(
                f"method.optim.{changed[0]}: expected {changed[2]} as the run was planned, got {changed[1]}; "
                "--replan plans its schedules again"
            )
        pretrain(config, folder.path, resume=True, check=options.check)
        return
    if options.replan:
        raise InputError("--replan: expected --resume RUN beside it")
    if not options.out and not options.check:
        raise InputError("pretrain: expected --out RUN, the folder of the new run")
    out = RunFolder(Path(options.out or "."))
    resume = options.auto_resume and bool(out.checkpoints())
    pretrain(_new_config(options), out.path, resume=resume, check=options.check)


def _quickstart(options: argparse.Namespace) -> None:
    name = QUICKSTARTS[options.backbone]
    out = Path(options.out) if options.out else _free_folder(Path("runs") / name)
    quickstart(_overridden(preset(name), options), out)


def _free_folder(wanted: Path) -> Path:
    """The folder itself, or the first of its numbered siblings that is not there yet."""
    siblings = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([wanted], siblings) if not path.exists())


def _extract(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    config = folder.config()
    backbone_config = config.method.backbone
    subnets = _subnets(options.subnets, backbone_config.space)
    if options.image_size is not None:
        backbone_config.grid(options.image_size)
    network, checkpoint = folder.network(options.branch, options.step)
    for subnet in subnets:
        path = extract(
            network.backbone,
            subnet,
            Path(options.out or folder.path / "models"),
            config.method.crops,
            image_size=options.image_size,
            source=f"{checkpoint.path} ({options.branch})",
        )
        print(path)


def _evaluate(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    config = folder.config()
    if options.data:
        config = with_run(config, data=options.data)
    subnets = _subnets(options.subnets, config.method.backbone.space)
    if options.plot:
        require_matplotlib()
    with world(options.device, config.run.timeout) as here:
        data = open_data(config.run.data, config.run.holdout, config.method.seed, config.run.unreadable_share)
        network, _ = folder.network(options.branch, options.step)
        backbone = network.backbone.to(here.device)
        initial = None
        if options.initial:
            initial = initial_network(config, options.branch).backbone.to(here.device)
        report = evaluate_subnets(
            backbone, subnets, data, config, here, initial=initial, linear=options.linear
        )
    if not here.is_main:
        return
    print(report.table())
    out = Path(options.out or folder.path / "evaluation.json")
    report.write(out)
    print(out)
    if options.plot:
        report.plot(Path(options.plot))
        print(options.plot)


def _report(options: argparse.Namespace) -> None:
    folders = [RunFolder(Path(run)) for run in options.run]
    if options.record:
        out = Path(options.record)
        record_band(folders, out)
    elif len(folders) > 1:
        raise InputError(f"report: expected one run, or --record FILE with several, got {len(folders)} runs")
    else:
        out = Path(options.out or folders[0].path / "report.html")
        write_report(folders[0], out)
    print(out)


def _loader(options: argparse.Namespace) -> None:
    config = _new_config(options)
    for row in loader_speed(config, options.workers, options.seconds):
        print(row, flush=True)


def _memory(options: argparse.Namespace) -> None:
    for row in memory_report(_new_config(options)):
        print(row, flush=True)


def _warmup(options: argparse.Namespace) -> None:
    for row in warm_up(_new_config(options)):
        print(row, flush=True)


def _list_subnets(options: argparse.Namespace) -> None:
    config = RunFolder(Path(options.run)).config() if options.run else _new_config(options)
    method = config.method
    backbone, counts = method.backbone, method.backbone.space.multiplicities()
    rows: list[dict[str, Any]] = [
        {
            "width": s.width,
            "depth": s.depth,
            "params": backbone.parameters(s),
            "flops": backbone.flops(s),
            "draws": counts[s] - (s == backbone.space.intact and len(counts) > 1),
        }
        for s in backbone.space
    ]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{len(rows)} subnets; FLOPs of one {backbone.image_size}-pixel image; draws in a round")
    names = [str(s) for s in backbone.space]
    wide = max(9, *map(len, names))
    print(f"{'subnet':>{wide}} {'params':>12} {'GFLOPs':>9} {'draws':>6}")
    for name, row in zip(names, rows, strict=True):
        print(f"{name:>{wide}} {row['params']:>12,} {row['flops'] / 1e9:>9.3f} {row['draws']:>6}")


def _new_config(options: argparse.Namespace) -> Config:
    """Of a preset, a file or the run to start from, in this order; the quickstart's where none is named."""
    source = getattr(options, "init_from", None)
    if options.preset and options.config:
        raise InputError("expected one of --preset and --config, got both")
    if options.config:
        try:
            values = json.loads(Path(options.config).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"config: expected a JSON file, got {options.config}: {error}") from None
        config = from_dict(Config, values)
    elif source and not options.preset:
        config = RunFolder(Path(source)).config()
    else:
        config = preset(options.preset or "quickstart")
    return _overridden(with_run(config, init_from=source) if source else config, options)


def _overridden(config: Config, options: argparse.Namespace) -> Config:
    """Apply `--data`, `--device` and `KEY=VALUE` in this order."""
    changes = {key: getattr(options, key, None) for key in ("data", "device")}
    config = with_run(config, **{key: value for key, value in changes.items() if value})
    return override(config, options.overrides)


def _subnets(names: Sequence[str], space: SearchSpace) -> list[Subnet]:
    if list(names) == ["all"]:
        return list(space)
    parts = [part for name in names for part in name.split(",") if part]
    if not parts:
        raise InputError(
            f"--subnets: expected subnets such as {space.smallest}, or all, got {' '.join(names)!r}"
        )
    return [space.require(Subnet.parse(part)) for part in parts]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, without the usage text."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="poa", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pretrain(commands, arguments)
    _add_queries(commands)
    _add_planning(commands)
    return parser


def _add_pretrain(commands: argparse._SubParsersAction[_Parser], arguments: Sequence[str]) -> None:
    """`pretrain`, whose help lists every option with the values of the preset in use."""
    presets = "\n".join(f"  {name:<12} {text}" for name, (_, text) in PRESETS.items())
    command = commands.add_parser(
        "pretrain",
        help="train a run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train a run on one device, or under torchrun on many.\n\npresets:\n{presets}",
        epilog=_options_help(arguments) if {"-h", "--help"} & set(arguments) else None,
    )
    command.add_argument("--preset", help="what to start from; default quickstart")
    command.add_argument("--config", help="instead of a preset: the config.json of another run")
    command.add_argument("--data", help="digits, or a folder of images (run.data)")
    command.add_argument("--out", help="run folder, new")
    command.add_argument("--resume", metavar="RUN", help="continue this run from its checkpoint")
    command.add_argument(
        "--replan", action="store_true", help="with --resume: take other method.optim options, such as epochs"
    )
    command.add_argument(
        "--init-from",
        metavar="RUN",
        help="start from the weights of this run, with its options or --preset's",
    )
    command.add_argument(
        "--check", action="store_true", help="say what was found and what the run would do, and stop"
    )
    command.add_argument("--auto-resume", action="store_true", help="continue --out where it holds a run")
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N (run.device)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any option below")
    command.set_defaults(command=_pretrain)


def _options_help(arguments: Sequence[str]) -> str:
    """Every option with its type, value and meaning."""
    names = [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--preset"]
    name = names[-1] if names and names[-1] in PRESETS else "quickstart"
    config = preset(name)
    lines = [f"options, with the values of preset {name}:", *_described(config)]
    for other in CONFIGS:
        if not isinstance(config.method.backbone, other):
            lines.append(f"\nthose of method.backbone.kind={other.kind}, with its defaults:")
            lines += _described(other(), "method.backbone")
    return "\n".join(lines)


def _described(options: Any, path: str = "") -> Iterator[str]:
    for key, kind, value, text in describe(options, path):
        shown = ",".join(str(v) for v in value) if isinstance(value, tuple) else value
        yield f"  {key}={shown}\n      {kind}: {text}"


RUN_HELP = "run folder that pretrain wrote"


def _add_queries(commands: argparse._SubParsersAction[_Parser]) -> None:
    """The commands that read runs."""
    which: dict[str, Any] = {"nargs": "+", "metavar": "WxD"}
    which["help"] = "subnets such as 384x12, or all"
    branch: dict[str, Any] = {"choices": ("teacher", "student"), "default": "teacher"}
    branch["help"] = "whose weights"
    step: dict[str, Any] = {
        "type": int,
        "metavar": "N",
        "help": "checkpoint of this step; default the newest",
    }

    command = commands.add_parser("extract", help="write subnets as safetensors files in timm's naming")
    command.add_argument("run", help=RUN_HELP)
    command.add_argument("--subnets", required=True, **which)
    command.add_argument("--out", help="folder; default RUN/models")
    command.add_argument("--image-size", type=int, help="bake position embeddings for this size, pixels")
    command.add_argument("--branch", **branch)
    command.add_argument("--step", **step)
    command.set_defaults(command=_extract)

    command = commands.add_parser("evaluate", help="k-NN and linear accuracy of subnets on held-out images")
    command.add_argument("run", help=RUN_HELP)
    command.add_argument("--subnets", default=["all"], **which)
    command.add_argument("--data", help="digits or a folder; default: the run's own")
    command.add_argument("--initial", action="store_true", help="also score the weights before training")
    command.add_argument("--linear", action="store_true", help="train linear classifiers too")
    command.add_argument("--out", help="JSON file; default RUN/evaluation.json")
    command.add_argument("--plot", help="picture of accuracy against size, e.g. accuracy.png")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--branch", **branch)
    command.add_argument("--step", **step)
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("report", help="draw the curves of a run into one page")
    command.add_argument("run", nargs="+", help=RUN_HELP)
    command.add_argument("--out", help="page (.html) or picture (.png, .svg, ...); default RUN/report.html")
    command.add_argument("--record", metavar="FILE", help="write the range of several runs' figures instead")
    command.set_defaults(command=_report)

    command = commands.add_parser("subnets", help="list the subnets of a run or preset with their sizes")
    command.add_argument("run", nargs="?", help=RUN_HELP)
    command.add_argument("--preset", help="instead of a run: " + ", ".join(PRESETS))
    command.add_argument("--json", action="store_true", help="one JSON list")
    command.set_defaults(command=_list_subnets, config=None, overrides=[])


def _add_planning(commands: argparse._SubParsersAction[_Parser]) -> None:
    """The commands that prepare a run, and the demonstration."""
    command = commands.add_parser("memory", help="predict what a step needs of a GPU's memory, without one")
    command.add_argument("preset", help="one of " + ", ".join(PRESETS))
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the run")
    command.set_defaults(command=_memory, config=None, data=None)

    command = commands.add_parser("warmup", help="compile every kernel that a run can need, and keep them")
    command.add_argument("preset", help="one of " + ", ".join(PRESETS))
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the run")
    command.set_defaults(command=_warmup, config=None, data=None)

    command = commands.add_parser(
        "loader", help="measure how fast images are read and decoded, without training"
    )
    command.add_argument("--data", required=True, help="where the images are, as in pretrain")
    command.add_argument("--preset", help="whose canvas and batches; default quickstart")
    command.add_argument("--workers", type=int, nargs="+", default=[1], help="numbers of processes to try")
    command.add_argument("--seconds", type=float, default=10.0, help="to measure each")
    command.set_defaults(command=_loader, config=None, overrides=[])

    command = commands.add_parser("quickstart", help="pre-train on digits, extract and evaluate all subnets")
    command.add_argument("--backbone", choices=tuple(QUICKSTARTS), default="vit", help="of what kind")
    command.add_argument("--out", help="run folder, new; default runs/PRESET, or -2, -3, ...")
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options as in pretrain")
    command.set_defaults(command=_quickstart)


if __name__ == "__main__":
    sys.exit(main())
