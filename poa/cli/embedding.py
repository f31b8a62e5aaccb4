"""The command `poa embed`."""

from __future__ import annotations

import argparse
from pathlib import Path

from poa.cli.arguments import Command, add_weights, number, values
from poa.data.layout import SOURCES
from poa.data.loader import EVALUATION_BATCH
from poa.distributed import is_main_process
from poa.embedding import TOKENS, embed
from poa.embedding.nearest import Nearest, require_page
from poa.errors import InputError
from poa.export import load


def add_embed(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("embed", help="write the features of all images of a source to a file")
    command.add_argument("model", metavar="MODEL_OR_RUN", help="folder of an extracted model, or of a run")
    command.add_argument("images", metavar="IMAGES", help=SOURCES)
    command.add_argument(
        "--out",
        required=True,
        help="file of the features: .npz, .npy (memory-mapped, names in a .json) or .parquet",
    )
    command.add_argument("--subnet", metavar="WxD", help="subnet of a run (default: the intact network)")
    add_weights(command)
    command.add_argument(
        "--tokens",
        nargs="+",
        choices=TOKENS,
        default=["cls"],
        help="features: the class token, the mean of the patch tokens, the patch tokens (default: cls)",
    )
    command.add_argument(
        "--query", nargs="+", metavar="IMAGE", help="also find the images most similar to these"
    )
    command.add_argument(
        "--neighbours",
        type=number(int, "[1, 10000]"),
        default=10,
        help="how many for each --query (default: %(default)s)",
    )
    command.add_argument("--page", help="page (.html) of the --query images and their neighbours")
    command.add_argument("--device", default="auto", help="device to compute on: auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--workers",
        type=number(int, "[0, 1024]"),
        default=4,
        help="processes per rank that decode images, at most one per CPU (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=number(int, "[1, 65536]"),
        default=EVALUATION_BATCH,
        help="images that a rank computes at a time (default: %(default)s)",
    )
    command.add_argument(
        "--threads",
        type=number(int, "[1, 1024]"),
        help="CPU threads of PyTorch (default: OMP_NUM_THREADS, or one if that is not set)",
    )
    command.set_defaults(command=run_embed)


def run_embed(options: argparse.Namespace) -> None:
    if bool(options.query) != bool(options.page):
        raise InputError("embed: expected --query IMAGE and --page FILE.html together, got one of them")
    page = Path(options.page) if options.page else None
    if page:
        require_page(page, "--page")
    nearest = Nearest(options.query, options.neighbours) if options.query else None
    model = load(options.model, options.subnet, branch=options.branch, step=options.step)
    given = values(options, "out", "tokens", "device", "workers", "batch_size", "threads")
    report = embed(model, options.images, nearest=nearest, **given)
    if is_main_process():
        print(report, options.out, sep="\n")
        if nearest and page:
            nearest.write(page)
            print(page)
