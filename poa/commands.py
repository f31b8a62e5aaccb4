"""What each command of the command line does, given its parsed options."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from poa.checkpoint import Checkpoint, RunFolder
from poa.config import Config, with_data, with_run
from poa.device import use_threads
from poa.distributed import World, init_distributed
from poa.drawing import require_drawable
from poa.errors import InputError
from poa.evaluate import PROTOCOLS, Origin, evaluate_subnets, evaluation_file
from poa.export import extract
from poa.files import make_folder, read_json, require_writable
from poa.images import open_on_ranks
from poa.loader_speed import loader_speed
from poa.memory import memory_report
from poa.network import Network
from poa.options import differences, from_dict, override
from poa.presets import preset
from poa.quickstart import quickstart
from poa.report import record_band, write_report
from poa.step import initial_network
from poa.subnets import SearchSpace, Subnet
from poa.train import pretrain
from poa.warmup import warm_up, warm_up_absent

QUICKSTARTS = {"vit": "quickstart", "swin": "quickstart-swin", "resnet": "quickstart-resnet"}


def run_pretrain(options: argparse.Namespace) -> None:
    if options.resume:
        if options.preset or options.config or options.out or options.auto_resume or options.init_from:
            raise InputError(
                "--resume: expected no --preset, --config, --init-from, --out or --auto-resume with it"
            )
        folder = RunFolder(Path(options.resume))
        config = _overridden(folder.config(), options)
        changed = next(differences(config.method.optim, folder.config().method.optim), None)
        if changed and not options.replan:
            raise InputError(
                f"method.optim.{changed[0]}: expected {changed[2]} as the run was planned, got {changed[1]}; "
                "--replan recomputes its schedules"
            )
        pretrain(config, folder.path, resume=True, check=options.check)
        return
    if options.replan:
        raise InputError("--replan: expected --resume RUN with it")
    config = _new_config(options)
    if not options.out and not options.check:
        raise InputError("pretrain: expected --out RUN, the folder of the new run")
    out = RunFolder(Path(options.out or "."))
    resume = options.auto_resume and bool(out.checkpoints())
    if options.out and not resume:
        out.require_new()
    pretrain(config, out.path, resume=resume, check=options.check)


def run_quickstart(options: argparse.Namespace) -> None:
    name = QUICKSTARTS[options.backbone]
    out = Path(options.out) if options.out else _free_folder(Path("runs") / name)
    quickstart(_overridden(preset(name), options), out)


def _free_folder(wanted: Path) -> Path:
    """The folder itself, or the first of its numbered siblings that does not exist."""
    siblings = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([wanted], siblings) if not path.exists())


def run_extract(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    config = folder.config()
    use_threads(config.performance.threads, torch.device("cpu"))
    backbone_config = config.method.backbone
    subnets = _subnets(options.subnets, backbone_config.space)
    if options.image_size is not None:
        backbone_config.grid(options.image_size)
    out = Path(options.out or folder.path / "models")
    network, checkpoint = folder.network(options.branch, options.step)
    make_folder(out, "--out")
    for subnet in subnets:
        path = extract(
            network.backbone,
            subnet,
            out,
            config.method.crops,
            canvas=config.method.canvas,
            bits=config.data.bits,
            image_size=options.image_size,
            source=f"{checkpoint.path} ({options.branch})",
        )
        print(path)


def run_evaluate(options: argparse.Namespace) -> None:
    folder = RunFolder(Path(options.run))
    config = folder.config()
    if options.data:
        config = with_data(config, options.data)
    subnets = _subnets(options.subnets, config.method.backbone.space)
    out = Path(options.out or evaluation_file(folder, config.data.source, options.branch))
    with init_distributed(options.device, config.run.timeout, config.performance.threads) as world:
        world.from_main(partial(_require_outputs, out, options.plot))
        data = open_on_ranks(config, world)
        network, checkpoint = _common_network(folder, options, world)
        origin = Origin.of(folder, checkpoint, options.branch)
        backbone = network.backbone.to(world.device)
        initial = None
        if options.initial:
            initial = initial_network(config, options.branch).backbone.to(world.device)
        protocols = [p for p in PROTOCOLS if p.help is None or getattr(options, p.name)]
        report = evaluate_subnets(
            backbone, subnets, data, config, world, origin, initial=initial, protocols=protocols
        )
    if not world.is_main:
        return
    if data.left_out:
        print(f"left out: {data.left_out}")
    report.write(out)
    if options.plot:
        report.plot(Path(options.plot))
    print(report.table())
    print(*filter(None, (out, options.plot)), sep="\n")


def _common_network(
    folder: RunFolder, options: argparse.Namespace, world: World
) -> tuple[Network, Checkpoint]:
    """The same network in all processes, also where a run is saving newer ones meanwhile."""
    while True:
        network, checkpoint = folder.network(options.branch, options.step)
        if len(set(world.gather(checkpoint.step))) == 1:
            return network, checkpoint


def _require_json(path: Path, option: str, key: str) -> None:
    """Raise InputError where no JSON can be written, or there is a file without this key, thus another's."""
    require_writable(path, option)
    expected = f"{option}: expected a new file, or an older one of this command to replace"
    found = read_json(path, expected) if path.exists() else {key: None}
    if not isinstance(found, dict) or key not in found:
        raise InputError(f"{expected}, got {path}")


def _require_outputs(out: Path, plot: str | None) -> None:
    _require_json(out, "--out", "settings")
    if plot:
        require_drawable(Path(plot), "--plot")


def run_report(options: argparse.Namespace) -> None:
    if options.record and options.out:
        raise InputError("report: expected one of --out and --record, got both")
    folders = [RunFolder(Path(run)) for run in dict.fromkeys(options.run)]
    for folder in folders:
        folder.config()
    if options.record:
        out = Path(options.record)
        _require_json(out, "--record", "band")
        record_band(folders, out)
    else:
        name = "report.html" if len(folders) == 1 else "comparison.html"
        out = Path(options.out or folders[0].path / name)
        write_report(folders, out)
    print(out)


def run_loader(options: argparse.Namespace) -> None:
    config = _new_config(options)
    for row in loader_speed(config, options.workers, options.seconds):
        print(row, flush=True)


def run_memory(options: argparse.Namespace) -> None:
    config = _new_config(options)
    print("running steps on meta tensors, some seconds per line", flush=True)
    for row in memory_report(config):
        print(row, flush=True)


def run_warmup(options: argparse.Namespace) -> None:
    config, cache = _new_config(options), Path(options.cache)
    absent = (config, options.arch, cache, options.triton_key)
    for row in warm_up_absent(*absent) if options.arch else warm_up(config):
        print(row, flush=True)


def list_subnets(options: argparse.Namespace) -> None:
    if options.run and (options.preset or options.overrides):
        raise InputError("subnets: expected a run, or --preset and KEY=VALUE, got both")
    config = RunFolder(Path(options.run)).config() if options.run else _new_config(options)
    backbone = config.method.backbone
    space, counts = backbone.space, Counter(backbone.space.round_of_draws())
    rows: list[dict[str, Any]] = [
        {
            "subnet": str(s),
            "width": s.width,
            "depth": s.depth,
            "params": backbone.parameters(s),
            "flops": backbone.flops(s),
            "draws": counts[s],
        }
        for s in space
    ]
    if options.json:
        print(json.dumps(rows))
        return
    stages = "depth (blocks of each stage)" if len(space.intact.blocks) > 1 else "depth (blocks)"
    print(f"{len(rows)} subnets of a {backbone.kind}, named by width (channels) and {stages}")
    print(f"params: without projection heads. GFLOPs: a forward of one {backbone.image_size}-pixel image,")
    print(f"2 per multiply-add. draws: times it is the elastic student in a round of {counts.total()} draws.")
    wide = max(9, *(len(row["subnet"]) for row in rows))
    print(f"{'subnet':>{wide}} {'params':>12} {'GFLOPs':>9} {'draws':>6}")
    for row in rows:
        size = f"{row['params']:>12,} {row['flops'] / 1e9:>9.3g}"
        print(f"{row['subnet']:>{wide}} {size} {row['draws']:>6}")


def _new_config(options: argparse.Namespace) -> Config:
    """Of a preset, a file or the run to start from, in this order; the quickstart's where none is named."""
    source = getattr(options, "init_from", None)
    if options.preset and options.config:
        raise InputError("expected one of --preset and --config, got both")
    if options.config:
        config = from_dict(Config, read_json(Path(options.config), "config: expected a JSON file"))
    elif source and not options.preset:
        config = RunFolder(Path(source)).config()
    else:
        config = preset(options.preset or "quickstart")
    return _overridden(with_run(config, init_from=source) if source else config, options)


def _overridden(config: Config, options: argparse.Namespace) -> Config:
    """Apply `--data`, `--device` and `KEY=VALUE` in this order."""
    if data := getattr(options, "data", None):
        config = with_data(config, data)
    if device := getattr(options, "device", None):
        config = with_run(config, device=device)
    return override(config, options.overrides)


def _subnets(names: Sequence[str], space: SearchSpace) -> list[Subnet]:
    if list(names) == ["all"]:
        return list(space)
    parts = [part for name in names for part in name.split(",") if part]
    if not parts:
        raise InputError(
            f"--subnets: expected subnets such as {space.smallest}, or all, got {' '.join(names)!r}"
        )
    return [space.require(Subnet.parse(part)) for part in dict.fromkeys(parts)]
