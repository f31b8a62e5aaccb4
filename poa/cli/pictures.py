"""The command `poa pictures`: its options, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.cli.arguments import Command, add_subnets, add_weights
from poa.embedding.nearest import require_page
from poa.embedding.pictures import write_pictures
from poa.embedding.prototypes import prototypes_page
from poa.errors import InputError
from poa.export import load
from poa.files import write_text


def add_pictures(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("pictures", help="draw attention maps, patch tokens and matches of images")
    add_subnets(command, default=["all"])
    add_weights(command)
    command.add_argument("--images", nargs="+", metavar="FILE", help="images to look at")
    command.add_argument(
        "--match", metavar="FILE", help="an image; lines join its patches with the most alike of --images"
    )
    command.add_number(
        "--prototypes", int, "[1, 1e6]", "show images nearest to the N most used prototypes", metavar="N"
    )
    command.add_argument(
        "--out",
        help="page, or with --images .png, to write (default: RUN/pictures.html, or RUN/prototypes.html)",
    )
    command.set_defaults(command=run_pictures)


def run_pictures(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    subnets = folder.config().method.backbone.space.named(options.subnets)
    if bool(options.images) == bool(options.prototypes):
        raise InputError("pictures: expected one of --images FILE and --prototypes N")
    if options.match and not options.images:
        raise InputError("pictures: expected --images FILE with --match, got none")
    out = Path(options.out or folder.path / ("pictures.html" if options.images else "prototypes.html"))
    require_page(out, "--out", *([".png"] if options.images else []))
    if options.prototypes:
        write_text(out, prototypes_page(folder, options.prototypes, options.step))
        print(out)
        return
    models = [load(folder.path, subnet, branch=options.branch, step=options.step) for subnet in subnets]
    write_pictures(models, options.images, out, options.match)
    print(out)
