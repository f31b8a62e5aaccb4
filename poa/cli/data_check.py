"""The commands `data check` and `data stats`: their options, and what they say of a collection of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poa.checkpoint import RunFolder
from poa.cli.arguments import Command, add_overrides, describe_commands
from poa.config import Config, with_data
from poa.data.inspect import Inspection, class_sizes, inspect, nearest_hashes
from poa.data.layout import SOURCES
from poa.data.sources import DataSplit
from poa.data.statistics import pixel_statistics
from poa.data.summary import EXAMPLES, printable
from poa.device import choose_device, use_threads
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.features import extract_features
from poa.evaluate.knn import class_token, nearest
from poa.files import require_json, write_json
from poa.options import override
from poa.plan import counted, describe_data
from poa.presets import preset


def add_data(group: argparse._SubParsersAction[Command]) -> None:
    command = group.add_parser("data", help="look at images without training")
    inner = command.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    check = inner.add_parser(
        "check", help="read every image: what will be used, what is unreadable, near-duplicates across splits"
    )
    check.add_argument("--run", metavar="RUN", help="also find near-duplicates by features of this run")
    check.add_number(
        "--bits", int, "[0, 32]", "most bits of 64 by which hashes of near-duplicates differ", default=6
    )
    check.add_number(
        "--similarity", float, "[0, 1]", "lowest cosine similarity of near-duplicates, by --run", default=0.98
    )
    check.add_argument("--device", default="auto", help="device of --run: auto, cpu, cuda or cuda:N")
    check.add_argument("--out", help="also write all near-duplicates and unreadable images to this JSON file")
    check.set_defaults(command=check_data)
    stats = inner.add_parser("stats", help="find the mean and std of each channel, as options of a run")
    stats.set_defaults(command=print_stats, run=None)
    describe_commands(inner)
    for each in (check, stats):
        each.add_argument("path", metavar="PATH", help=SOURCES)
        each.add_number("--channels", int, "[1, 16]", "channels of the images (default: 3)")
        each.add_number("--workers", int, "[0, 1024]", "decoding processes", default=1)
        add_overrides(each, "options of data, such as holdout=0.1")


def _opened(options: argparse.Namespace) -> tuple[Config, DataSplit]:
    """The images that are asked for, and the configuration of `--run`, or one that has their options."""
    config = RunFolder(Path(options.run)).config() if options.run else preset("quickstart")
    config = override(with_data(config, options.path), options.overrides)
    channels = options.channels or config.method.backbone.channels
    if options.run and channels != config.method.backbone.channels:
        raise InputError(
            f"--channels: expected the {config.method.backbone.channels} of {options.run}, got {channels}"
        )
    data = config.data.open(config.method.seed, channels=channels)
    print(f"data: {describe_data(config, data)}", flush=True)
    for line in _of_files(data):
        print(line, flush=True)
    return config, data


def print_stats(options: argparse.Namespace) -> None:
    config, data = _opened(options)
    stats = pixel_statistics(data.train, config.method.canvas, options.workers)
    values = {name: [round(value, 4) for value in getattr(stats, name)] for name in ("mean", "std")}
    shown = [f"channels={len(stats.mean)}", *(f"{k}={','.join(map(str, v))}" for k, v in values.items())]
    print(f"{counted(stats.images, 'training image')} used; {len(stats.unreadable):,} more could not be read")
    print(*shown)
    print(json.dumps({"images": stats.images, "channels": len(stats.mean), **values}))


def check_data(options: argparse.Namespace) -> None:
    if options.out:
        require_json(Path(options.out), "--out", "near_duplicates")
    config, data = _opened(options)
    looks = [inspect(source, options.workers) for source in (data.train, data.test) if source is not None]
    unreadable = [message for look in looks for message in look.unreadable]
    print(_of_sizes(looks))
    asked = sum(len(look.sizes) for look in looks) + len(unreadable)
    shown = f" ({_examples(map(printable, unreadable[:EXAMPLES]), len(unreadable))})" if unreadable else ""
    print(f"unreadable: {len(unreadable):,} of {asked:,} images{shown}")
    pairs = []
    if len(looks) == 2 and all(len(look.hashes) for look in looks):
        pairs = _by_hash(looks, options.bits)
        print(*_of_pairs(pairs, len(looks[1].hashes), f"in at most {options.bits} of 64 hash bits"), sep="\n")
        if options.run:
            close = _by_features(looks, options, config)
            above = f"cosine similarity of features at least {options.similarity:g}"
            print(*_of_pairs(close, len(looks[1].hashes), above), sep="\n")
            pairs += close
    else:
        why = data.untested or "none that can be read"
        print(f"near-duplicates: not looked for, there are no held-out images ({why})")
    if options.out:
        write_json(Path(options.out), {"near_duplicates": pairs, "unreadable": unreadable})
        print(options.out)


def _examples(shown: Any, count: int) -> str:
    return "; ".join(shown) + "; ..." * (count > EXAMPLES)


def _of_files(data: DataSplit) -> Iterator[str]:
    """What was found without reading images."""
    if data.left_out:
        yield f"left out: {data.left_out}"
    for line in data.lost:
        yield f"lost: {line}"
    if classes := class_sizes(data.train):
        (small, fewest), (large, most) = classes[0], classes[-1]
        middle = classes[len(classes) // 2][1]
        yield (
            f"classes: {len(classes):,}, from {fewest:,} training images ({printable(small)}) to {most:,} "
            f"({printable(large)}), median {middle:,}"
        )
    if untaught := data.untaught():
        yield f"untaught: {untaught}"


def _of_sizes(looks: list[Inspection]) -> str:
    sizes = np.concatenate([look.sizes for look in looks])
    if not len(sizes):
        return "sizes: none"
    area = sizes.prod(1).argsort(kind="stable")
    smallest, median, largest = (
        "{1:,} x {0:,}".format(*sizes[area[i]]) for i in (0, len(area) // 2, len(area) - 1)
    )
    if smallest == largest:
        return f"sizes: all {smallest} pixels"
    return f"sizes: {smallest} to {largest} pixels (width x height), median {median}"


def _by_hash(looks: list[Inspection], most: int) -> list[dict[str, Any]]:
    """Held-out images with the training image that looks most like them, the likest first."""
    train, test = looks
    bits, positions = nearest_hashes(test.hashes, train.hashes)
    order = [int(i) for i in bits.argsort(kind="stable") if bits[i] <= most]
    return [_pair(looks, i, int(positions[i])) | {"bits": int(bits[i])} for i in order]


@torch.no_grad()
def _by_features(
    looks: list[Inspection], options: argparse.Namespace, config: Config
) -> list[dict[str, Any]]:
    """The same by features of the intact teacher."""
    device, method = choose_device(options.device), config.method
    use_threads(config.performance.threads, device)
    network, _ = RunFolder(Path(options.run)).network("teacher", None)
    backbone = network.backbone.to(device)
    token = class_token(backbone, backbone.space.intact)
    banks = []
    for look in looks:
        extracted = extract_features(
            [token],
            look.source,
            method.crops,
            World(0, 1, device),
            canvas=method.canvas,
            workers=options.workers,
        )
        assert extracted is not None
        banks.append(extracted.features[0])
    similarity, positions = (x[:, 0] for x in nearest(torch.nn.functional.normalize(banks[1]), banks[0], 1))
    order = [int(i) for i in similarity.argsort(descending=True) if similarity[i] >= options.similarity]
    return [
        _pair(looks, i, int(positions[i])) | {"similarity": round(float(similarity[i]), 4)} for i in order
    ]


def _pair(looks: list[Inspection], test: int, train: int) -> dict[str, Any]:
    train_images, test_images = (look.source for look in looks)
    return {
        "held_out": test_images.name(test),
        "train": train_images.name(train),
        "labels": [test_images.label(test), train_images.label(train)],
    }


def _of_pairs(pairs: list[dict[str, Any]], count: int, how: str) -> Iterator[str]:
    """How many held-out images are like training images, how many with another label, and some of them."""
    others = sum(pair["labels"][0] != pair["labels"][1] for pair in pairs)
    with_others = f", {others:,} of them with another label" if others else ""
    yield f"near-duplicates: {len(pairs):,} of {count:,} held-out images in training ({how}){with_others}"
    for pair in pairs[:EXAMPLES]:
        alike = f"{pair['bits']} bits" if "bits" in pair else f"similarity {pair['similarity']}"
        yield f"  {printable(pair['held_out'])} is like {printable(pair['train'])} ({alike})"
