"""`python -m benchmarks`: measure kernels and steps side by side, and draw the tables from the rows.

    python -m benchmarks --list               every case and its peers
    python -m benchmarks kernels              all kernel cases; --case NAME, --all-widths, --provider NAME
    python -m benchmarks step                 the training step; --images 8 64, --official PATH
    python -m benchmarks networks             subnets of a preset against static ones of their size
    python -m benchmarks quality              k-NN against wall time on small images; --data PATH, --init
    python -m benchmarks sampling             what policies of drawing subnets cost; --processes
    python -m benchmarks profile              the largest kernels of one step
    python -m benchmarks roofline             the cost model of a preset
    python -m benchmarks launches             launches and host time of a step, without a GPU; --subnet 640x18
    python -m benchmarks predict              the time of a step, from its compiled kernels; --gpu, --subnet
    python -m benchmarks gpu                  all that needs a GPU, within --minutes; --resume, --parts
    python -m benchmarks report               renew the tables and plots of the README from the rows

Without a GPU each begins with a line that says what its figures are; no report takes them. All this is for
the root of a checkout; elsewhere, name the folder: python CHECKOUT/benchmarks gpu.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if not __package__:  # `python CHECKOUT/benchmarks`, which puts that folder first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import harness, results, roofline
from benchmarks.cases import CASES, TINY, sizes_of
from benchmarks.failures import Event, Refused
from benchmarks.gpu import PARTS, Plan, measure_all
from benchmarks.journal import Journal
from benchmarks.peers.official import require_checkout
from poa.cli.arguments import Arguments, add_overrides, number, parse_anywhere
from poa.config import Config
from poa.device import choose_device
from poa.options import override
from poa.presets import preset
from poa.subnets import Subnet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the kernel cases and their providers")
    commands = parser.add_subparsers(dest="command", parser_class=Arguments)
    for name, (function, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(function=function)
        for add in OPTIONS[name]:
            add(command)
    options, unknown = parse_anywhere(parser, arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.list:
        return list_cases()
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if options.command in ON_CPU and choose_device(options.device).type == "cpu":
            print(f"without a GPU: {ON_CPU[options.command]}; no row is written", flush=True)
        return int(options.function(options) or 0)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


TINY_SIZES = (
    "tiny sizes and PyTorch's own operators, to test that this runs; the times say nothing about the kernels"
)
ON_CPU = {
    **dict.fromkeys(("kernels", "step", "networks", "profile"), TINY_SIZES),
    "quality": "accuracies are real, and times are those of this CPU, which say nothing about a GPU",
    "sampling": "waiting is measured by processor time, the time that processes wait for a core left out",
}
"""What a command measures there."""


def list_cases() -> int:
    """Every kernel case with what it does and who computes it."""
    for case in CASES:
        problem = next(iter(case.problems(torch.device("cpu"), TINY)))()
        print(f"{case.name:16} {case.about}\n{'':16} providers: {', '.join(problem.providers)}")
    return 0


def keep(events: Iterable[Event], out: Path | None) -> int:
    """Print what is measured, and write rows of a GPU as they come; 1 where ours failed."""
    status = 0
    for event in events:
        if isinstance(event, Refused):
            print(f"    {event.provider:14} not measured: {event.reason}", flush=True)
            status |= event.provider == "ours"
        elif isinstance(event, dict):
            print(results.line(event), flush=True)
            if event["device"] == "cuda":
                file = f"{event['gpu'].lower().replace(' ', '-')}.jsonl"
                results.append(out or results.FOLDER / file, [event])
    return status


def kernels(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    sizes = sizes_of(device, options.all_widths)
    ceilings = harness.ceilings_of(device, options.seconds)
    print(f"{ceilings.matmul / 1e12:.1f} TFLOP/s, {ceilings.copy / 1e12:.2f} TB/s ({ceilings.source})")
    if unknown := set(options.case) - {case.name for case in CASES}:
        raise ValueError(
            f"--case: expected one of {', '.join(c.name for c in CASES)}, got {', '.join(unknown)}"
        )
    wanted = [case for case in CASES if not options.case or case.name in options.case]
    problems = (make for case in wanted for make in case.problems(device, sizes))
    return max(
        keep(harness.run(make(), ceilings, options.provider, options.seconds), options.out)
        for make in problems
    )


def step(options: argparse.Namespace) -> int:
    from benchmarks import step as benchmark

    device, rest = choose_device(options.device), (options.official, options.seconds)
    widths = options.all_widths
    runs = (benchmark.run(options.preset, n, device, *rest, all_widths=widths) for n in options.images)
    return max(keep(events, options.out) for events in runs)


def networks(options: argparse.Namespace) -> int:
    from benchmarks import networks as benchmark

    device, (images,) = choose_device(options.device), options.images
    return max(
        keep(benchmark.run(name, which, images, device, options.seconds), options.out)
        for name in options.preset
        for which in benchmark.SUBNETS
    )


def quality(options: argparse.Namespace) -> int:
    from benchmarks import quality as benchmark

    where = options.data, choose_device(options.device), options.minutes
    rows = benchmark.run(options.preset, *where, options.official, options.init, options.overrides)
    return keep(rows, options.out)


def sampling(options: argparse.Namespace) -> int:
    from benchmarks import sampling as benchmark

    rows = benchmark.run(options.preset, options.data, options.processes, options.steps, options.device)
    return keep(rows, options.out)


def profile(options: argparse.Namespace) -> int:
    from benchmarks import profiling

    what = options.preset, options.images[0], choose_device(options.device)
    print("\n".join(profiling.profile(*what)["lines"]))
    return keep(profiling.parts(*what, options.seconds), options.out)


def print_roofline(options: argparse.Namespace) -> None:
    work = roofline.Workload.of(preset(options.preset).method, options.images[0])
    print("a cost model, not a measurement: FLOPs and bytes counted, over the ceilings of a GPU")
    print(roofline.report(work, roofline.GPUS[options.gpu]))


def launches(options: argparse.Namespace) -> None:
    from benchmarks import launches as benchmark

    lines, summary = benchmark.run(*_planned(options))
    print(*lines, json.dumps(summary), sep="\n")


def predict(options: argparse.Namespace) -> None:
    from benchmarks import prediction

    lines, summary = prediction.run(*_planned(options), options.gpu, options.persistent)
    print(*lines, json.dumps(summary), sep="\n")


def trade(options: argparse.Namespace) -> None:
    from benchmarks.prediction import options as benchmark

    lines, summary = benchmark.run(*_planned(options))
    print(*lines, json.dumps(summary), sep="\n")


def _planned(options: argparse.Namespace) -> tuple[Config, Subnet]:
    """The step that options of `_launches` describe."""
    torch.set_num_threads(1)
    named = next((word for word in options.overrides if "=" not in word), options.preset)
    config = override(preset(named), [word for word in options.overrides if word != named])
    space = config.method.backbone.space
    return config, space.require(Subnet.parse(options.subnet)) if options.subnet else space.intact


def gpu(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("gpu: expected a CUDA device, got none; --device cpu rehearses, tiny")
    if options.official:
        require_checkout(options.official)
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    if not cuda:
        print(f"a rehearsal: {TINY_SIZES}", flush=True)
    name, memory = (cuda.name, cuda.total_memory) if cuda else ("rehearsal", 0)
    folder = options.out or results.FOLDER / name.lower().replace(" ", "-")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan = Plan(options.device, memory, options.official, options.all_widths)
    journal = Journal(folder, options.resume or options.retry, options.retry)
    return measure_all(plan, journal, options.minutes, options.parts)


def report(options: argparse.Namespace) -> None:
    from benchmarks import report as writer

    writer.write(options.rows or results.committed())


COMMANDS = {
    "kernels": (kernels, "measure operators against other implementations"),
    "step": (step, "measure the training step against naive slicing, compiled slicing and the official code"),
    "networks": (networks, "measure subnets against naive slicing and static networks of their size"),
    "quality": (quality, "measure k-NN accuracy of the teacher's subnets against wall time"),
    "sampling": (sampling, "measure how long ranks wait for each other, by policy of sampling subnets"),
    "profile": (profile, "list the twenty kernels of a step that take longest"),
    "roofline": (print_roofline, "print the cost model: FLOPs, bytes and lower bound of the time of a step"),
    "launches": (launches, "count the launches of a step by kind, and time its host code, without a GPU"),
    "predict": (predict, "predict the time of a step's kernels from their compiled code, without a GPU"),
    "options": (trade, "predict what options of performance trade: time and memory of a step, without a GPU"),
    "gpu": (gpu, "run everything that needs a GPU, most valuable parts first"),
    "report": (report, "write the tables and plots of the README from the rows"),
}


PRESET_HELP = "preset of the network and the method (default: %(default)s)"


def _device(parser: Arguments) -> None:
    parser.add_argument("--device", default="auto", help="device to measure on: auto, cuda, cuda:N or cpu")
    parser.add_argument("--out", type=Path, help="file of rows (default: benchmarks/results/GPU.jsonl)")
    about = "seconds of measuring each provider"
    parser.add_number("--seconds", float, "(0, 3600]", about, default=harness.MEASURE)


def _step(parser: Arguments) -> None:
    parser.add_argument("--preset", default="vit-l16", help=PRESET_HELP)
    parser.add_argument(
        "--images",
        type=number(int, "[1, 65536]"),
        nargs="+",
        default=[64],
        help="images of a step, one measurement each",
    )


def _gpu_name(parser: Arguments) -> None:
    choices = tuple(roofline.GPUS)
    about = "GPU whose peak FLOP/s and bandwidth are used (default: %(default)s)"
    parser.add_argument("--gpu", choices=choices, default="h200", help=about)


def _networks(parser: Arguments) -> None:
    presets = ["vit-l16", "swin-b", "resnet-152"]
    parser.add_argument("--preset", nargs="+", default=presets, help="presets whose subnets are measured")
    parser.add_argument(
        "--images", type=number(int, "[1, 65536]"), nargs=1, default=[64], help="images of a forward pass"
    )


def _official(parser: Arguments) -> None:
    parser.add_argument("--official", type=Path, help="checkout of the official code, github.com/alipay/POA")


def _kernels(parser: Arguments) -> None:
    parser.add_argument("--case", action="append", default=[], help="case to measure; repeatable")
    parser.add_argument("--provider", action="append", default=[], help="provider to measure; repeatable")


def _widths(parser: Arguments) -> None:
    parser.add_argument("--all-widths", action="store_true", help="measure all widths from 384 to 1024")


def _quality(parser: Arguments) -> None:
    parser.add_argument("--preset", default="small-images", help=PRESET_HELP)
    parser.add_argument("--data", default="digits", help="digits, or a folder of images (default: digits)")
    parser.add_number("--minutes", float, "(0, 100000]", "minutes of training each provider", default=3.0)
    parser.add_argument("--init", metavar="WEIGHTS", help="pretrained weights, as in poa pretrain")
    add_overrides(parser, "any option of a run, such as epochs=5")


def _sampling(parser: Arguments) -> None:
    parser.add_argument("--preset", default="quickstart", help=PRESET_HELP)
    parser.add_argument("--data", default="digits", help="images, as in poa pretrain (default: %(default)s)")
    parser.add_number("--processes", int, "[1, 1024]", "ranks on this machine", default=4)
    parser.add_number("--steps", int, "[1, 1e6]", "steps of each policy", default=60)


def _launches(parser: Arguments) -> None:
    parser.add_argument("--preset", default="vit-l16", help=PRESET_HELP)
    about = "any option of a run, such as method.batch_size=32; the preset may stand among them"
    add_overrides(parser, about)
    parser.add_argument("--subnet", metavar="WxD", help="subnet of the elastic student (default: intact)")


def _persistent(parser: Arguments) -> None:
    about = "persistent programs a processor, of the products that may have them (default: none)"
    parser.add_argument("--persistent", type=int, choices=(1, 2), default=0, help=about)


def _gpu(parser: Arguments) -> None:
    parser.add_argument("--out", type=Path, help="folder of the run (default: benchmarks/results/GPU)")
    about = "minutes until it stops and says what is left"
    parser.add_number("--minutes", float, "(0, 1440]", about, default=9.0)
    parser.add_argument("--resume", action="store_true", help="resume the run in --out: measure what is left")
    parser.add_argument("--retry", action="store_true", help="resume the run in --out and repeat what failed")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="measure only these parts, in this order",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cuda, or cpu for a rehearsal on tiny sizes"
    )


def _report(parser: Arguments) -> None:
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows (default: benchmarks/results)")


# Groups of options of each command.
OPTIONS: dict[str, Sequence[Callable[[Arguments], None]]] = {
    "kernels": (_device, _kernels, _widths),
    "step": (_device, _step, _official, _widths),
    "networks": (_device, _networks),
    "quality": (_device, _quality, _official),
    "sampling": (_device, _sampling),
    "profile": (_device, _step),
    "roofline": (_step, _gpu_name),
    "launches": (_launches,),
    "predict": (_launches, _gpu_name, _persistent),
    "options": (_launches,),
    "gpu": (_gpu, _official, _widths),
    "report": (_report,),
}

if __name__ == "__main__":
    raise SystemExit(main())
