"""The command `poa pictures`: its options, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.cli.arguments import Command, add_subnets, add_weights
from poa.embedding.nearest import require_page
from poa.embedding.pictures import write_pictures
from poa.export import load


def add_pictures(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser(
        "pictures", help="write a page with attention maps and colours of patch tokens of images"
    )
    add_subnets(command, default=["all"])
    add_weights(command)
    command.add_argument("--images", nargs="+", required=True, metavar="FILE", help="images to look at")
    command.add_argument("--out", help="page to write (default: RUN/pictures.html)")
    command.set_defaults(command=run_pictures)


def run_pictures(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    subnets = folder.config().method.backbone.space.named(options.subnets)
    out = Path(options.out or folder.path / "pictures.html")
    require_page(out, "--out")
    models = [load(folder.path, subnet, branch=options.branch, step=options.step) for subnet in subnets]
    write_pictures(models, options.images, out)
    print(out)
