"""The commands `embed`, `pairs` and `pictures`: their options, and what they do."""

from __future__ import annotations

import argparse
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.cli.arguments import Command, add_subnets, add_threads, add_weights, values
from poa.data.layout import SOURCES
from poa.data.loader import EVALUATION_BATCH
from poa.data.summary import EXAMPLES, printable
from poa.device import choose_device
from poa.distributed import is_main_process
from poa.embedding import TOKENS, embed
from poa.embedding.nearest import Nearest, require_page
from poa.embedding.pairs import non_finite, pair_rows, pairs_page, read_features, similar_pairs, write_pairs
from poa.embedding.pictures import write_pictures
from poa.embedding.prototypes import prototypes_page
from poa.errors import InputError
from poa.export import load
from poa.files import require_json, require_writable, write_text


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
    command.add_argument("--query", nargs="+", metavar="IMAGE", help="also find images most similar to these")
    command.add_number("--neighbours", int, "[1, 10000]", "neighbours of each --query", default=10)
    command.add_argument("--page", help="page (.html) of the --query images and their neighbours")
    command.add_argument("--device", default="auto", help="device to compute on: auto, cpu, cuda or cuda:N")
    command.add_number(
        "--workers", int, "[0, 1024]", "decoding processes per rank, at most one per CPU", default=4
    )
    command.add_number(
        "--batch-size", int, "[1, 65536]", "images per rank at a time", default=EVALUATION_BATCH
    )
    add_threads(command)
    command.set_defaults(command=run_embed)


def run_embed(options: argparse.Namespace) -> None:
    if bool(options.query) != bool(options.page):
        alone = "--query" if options.query else "--page"
        raise InputError(f"embed: expected --query IMAGE and --page FILE.html together, got {alone} alone")
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


def add_pairs(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser(
        "pairs", help="list near-duplicates by features: pairs of one collection, or copies across two"
    )
    command.add_argument("features", metavar="FEATURES", help="file of poa embed: .npy, .npz or .parquet")
    command.add_argument("--others", metavar="FEATURES", help="another file of poa embed: find copies in it")
    command.add_argument("--out", required=True, help="list of the pairs, most similar first: .csv or .json")
    command.add_number("--similarity", float, "[-1, 1]", "lowest cosine similarity of a pair", default=0.98)
    command.add_number("--most", int, "[1, 1e7]", "pairs that are listed, the most similar", default=10_000)
    command.add_argument("--page", help="page (.html) that shows the pairs")
    command.add_number("--shown", int, "[1, 10000]", "pairs on the --page, the most similar", default=200)
    command.add_argument(
        "--token", choices=("cls", "mean"), default="cls", help="features that are compared (default: cls)"
    )
    command.add_argument("--device", default="auto", help="device to compute on: auto, cpu, cuda or cuda:N")
    command.set_defaults(command=run_pairs)


def run_pairs(options: argparse.Namespace) -> None:
    out, page = Path(options.out), Path(options.page) if options.page else None
    if out.suffix not in (".csv", ".json"):
        raise InputError(f"--out: expected a name ending in .csv or .json, got {out}")
    if out.suffix == ".json":
        require_json(out, "--out", "pairs")
    require_writable(out, "--out")
    if page:
        require_page(page, "--page")
    first = read_features(Path(options.features), options.token)
    second = read_features(Path(options.others), options.token) if options.others else first
    first.require_model_of(second)
    others = second.features if options.others else None
    device = choose_device(options.device)
    pairs = similar_pairs(first.features, others, options.similarity, options.most, device)
    rows = pair_rows(pairs, first, second)
    about = {
        "features": [options.features, options.others or options.features],
        "data": [file.about["data"] for file in (first, second)],
        "token": options.token,
        "similarity": options.similarity,
        "total": pairs.total,
    }
    html = pairs_page(rows[: options.shown], first, second) if page else ""
    write_pairs(out, rows, about)
    if page:
        write_text(page, html)
    alike = len((pairs.positions[:, 0] if options.others else pairs.positions).unique())
    print(
        f"near-duplicates: {pairs.total:,} pairs with a cosine similarity of {options.similarity:g} or more, "
        f"{len(rows):,} of them listed, of {alike:,} of {len(first.names):,} images"
    )
    for path, file in {options.features: first, options.others or options.features: second}.items():
        if lost := non_finite(file.features):
            print(f"{path}: {lost:,} of {len(file.names):,} images have NaN or inf features, and no pair")
    for row in rows[:EXAMPLES]:
        print(f"  {printable(row['first'])} is like {printable(row['second'])} ({row['similarity']:.3f})")
    print(*(path for path in (out, page) if path), sep="\n")


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
