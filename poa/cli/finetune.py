"""The command `poa finetune`: its options, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.cli.arguments import Command, add_overrides, add_step, described
from poa.data.layout import SOURCES
from poa.errors import InputError, Preempted
from poa.finetune import RECIPES, recipe
from poa.finetune.train import resume
from poa.options import override
from poa.run import Run


def add_finetune(group: argparse._SubParsersAction[Command]) -> None:
    recipes = "\n".join(f"  {name:<10} {text}" for name, (_, text) in RECIPES.items())
    options = "\n".join(described(RECIPES["short"][0]))
    command = group.add_parser(
        "finetune",
        help="fine-tune all subnets of a run with classifiers in one elastic run, or single ones",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Fine-tune on labelled images; with torchrun on many devices.\n\nrecipes:\n{recipes}",
        epilog=f"options, with the values of recipe short:\n{options}",
    )
    command.add_argument("run", nargs="?", metavar="RUN", help="run folder written by pretrain")
    command.add_argument("--out", help="new run folder; of single subnets, where their run folders go")
    command.add_argument("--resume", metavar="OUT", help="resume this fine-tuning from its newest checkpoint")
    command.add_argument("--data", help=f"{SOURCES} (default: the data of the run)")
    command.add_argument(
        "--subnets",
        nargs="+",
        default=[],
        metavar="WxD",
        help="fine-tune each of these alone, in a run folder of its own (default: all in one)",
    )
    command.add_argument("--recipe", help="options to use, see below (default: short)")
    command.add_argument("--share", type=float, help="share of training images of each class, such as 0.1")
    command.add_argument("--device", help="device to train on: auto, cpu, cuda or cuda:N (default: auto)")
    add_step(command)
    add_overrides(command, "any option listed below, such as epochs=10")
    command.set_defaults(command=run_finetune)


def run_finetune(options: argparse.Namespace) -> None:
    words = [*([options.run] if options.run else []), *options.subnets]  # which take options, too
    options.overrides = [*(word for word in words if "=" in word), *options.overrides]
    options.run = None if options.run and "=" in options.run else options.run
    options.subnets = [word for word in options.subnets if "=" not in word]
    if options.resume:
        fixed = ("run", "out", "data", "subnets", "recipe", "share", "device", "step", "overrides")
        if any(getattr(options, name) for name in fixed):
            raise InputError("--resume: expected nothing else, as it goes on with the options of its run")
        resume(Path(options.resume))
        return
    if not (options.run and options.out):
        raise InputError("finetune: expected RUN and --out, or --resume OUT")
    chosen = override(recipe(options.recipe or "short"), options.overrides)
    if options.share is not None:
        chosen = override(chosen, {"share": options.share})
    run, out = Run(options.run), Path(options.out)
    space = run.config.method.backbone.space
    places = {subnet: out / str(subnet) for subnet in space.named(options.subnets)} if options.subnets else {}
    for place in places.values():
        RunFolder(place).require_new()
    for subnet, place in places.items() or [(None, out)]:
        try:
            run.finetune(
                place,
                options.data,
                subnet=subnet,
                recipe=chosen,
                device=options.device or "auto",
                step=options.step,
            )
        except Preempted as stop:
            waiting = [str(s) for s, other in places.items() if not other.exists()]
            rest = f"; not begun: {', '.join(waiting)}" if waiting else ""
            raise Preempted(f"{stop}{rest}", stop.interrupted) from None
