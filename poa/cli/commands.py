"""What each command of the command line does, given its parsed options."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from poa.checkpoint import RunFolder
from poa.classifier import Classifier
from poa.cli.arguments import values
from poa.config import Config, with_data, with_run, with_teacher
from poa.device import use_threads
from poa.distributed import is_main_process
from poa.errors import InputError
from poa.evaluate import PROTOCOLS
from poa.evaluate.models import BRANCH, evaluate_models
from poa.evaluate.protocol import Protocol
from poa.evaluate.suite import require_protocols
from poa.evaluate.sweep import evaluation_file
from poa.export import export_file, extract, load
from poa.export.card import push, write_card
from poa.export.formats import require_packages
from poa.export.int8 import export_int8, open_to_quantise
from poa.export.model import WEIGHTS
from poa.files import make_folder, read_json, require_json
from poa.initialization import initial_config
from poa.initialization.source import TIMM
from poa.loader_speed import loader_speed
from poa.memory import memory_report
from poa.options import from_dict, override
from poa.presets import QUICKSTARTS, preset
from poa.quickstart import quickstart
from poa.report import record_band, write_report
from poa.run import Run, pretrain, subnet_rows
from poa.warmup import warm_up, warm_up_absent


def run_pretrain(options: argparse.Namespace) -> None:
    if options.importance and not options.init:
        raise InputError("--importance: expected --init WEIGHTS with it")
    if options.resume:
        given = ("preset", "config", "init", "teacher", "out", "auto_resume")
        if any(getattr(options, name) for name in given):
            raise InputError(
                "--resume: expected no --preset, --config, --init, --teacher, --out or --auto-resume with it"
            )
        run = Run(options.resume)
        run.resume(config=_overridden(run.config, options), replan=options.replan, check=options.check)
        return
    if options.replan:
        raise InputError("--replan: expected --resume RUN with it")
    if options.importance:
        options.overrides = [f"method.init.importance={options.importance}", *options.overrides]
    config = _new_config(options)
    if not options.out and not options.check:
        raise InputError("pretrain: expected --out RUN, the folder of the new run")
    pretrain(preset=config, out=options.out, resume=options.auto_resume, check=options.check)


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
    subnets = backbone_config.space.named(options.subnets)
    if options.image_size is not None:
        backbone_config.grid(options.image_size)
    _require_together(options, len(subnets))
    out = Path(options.out or folder.path / "models")
    require_packages(options.format)
    data = open_to_quantise(config, options.image_size) if options.dtype == "int8" else None
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
            classifier=network if isinstance(network, Classifier) else None,
        )
        print(path)
        model = load(path)
        write_card(model, path, folder, f"{options.branch} of step {checkpoint.step}", options.license)
        if data:
            done = export_int8(model, path, data, config)
            print(f"{done.path}: {done.measure} accuracy {done.int8:.1%} in int8, {done.fp32:.1%} in fp32")
        elif options.format != "timm":
            print(export_file(model, path, options.format, options.dtype or "fp32"))
        if options.push:
            print(push(path, options.push, dry_run=options.dry_run))
    if backbone_config.timm_model() is None:
        print(f"poa: timm has no such {backbone_config.kind}; poa.load reads these folders", file=sys.stderr)


def _require_together(options: argparse.Namespace, subnets: int) -> None:
    """Raise InputError where options of extract do not fit each other."""
    takes = ("onnx",) if options.dtype == "int8" else ("onnx", "pt2")
    if options.dtype and options.format not in takes:
        expected = f"--format {' or '.join(takes)}"
        raise InputError(f"--dtype {options.dtype}: expected {expected} with it, got {options.format}")
    if options.dry_run and not options.push:
        raise InputError("--dry-run: expected --push USER/NAME with it")
    if options.push and subnets > 1:
        raise InputError(f"--push: expected one subnet, got {subnets}")


def run_evaluate(options: argparse.Namespace) -> None:
    chosen = [p.name for p in PROTOCOLS if p.help and not p.folder and getattr(options, p.name)]
    folders = {p.name: given for p in PROTOCOLS if p.folder and (given := getattr(options, p.name))}
    chosen += [options.suite] if options.suite else []
    runs = [name for name in options.run if not (name.startswith(TIMM) or (Path(name) / WEIGHTS).exists())]
    if not runs:
        _evaluate_models(options, require_protocols(chosen), folders)
        return
    if len(options.run) > 1:
        expected = "one run, or folders of extracted models and timm:NAME"
        raise InputError(f"evaluate: expected {expected}, got {runs[0]} among {len(options.run)}")
    given = values(options, "initial", "baselines", "branch", "step", "device", "out", "plot") | folders
    report = Run(runs[0]).evaluate(options.subnets, options.data, protocols=chosen, **given)
    if is_main_process():
        print(report.table(), *report.files, sep="\n")


def _evaluate_models(
    options: argparse.Namespace, protocols: list[Protocol], folders: dict[str, list[str]]
) -> None:
    """Of models, each of which has one size and no checkpoints."""
    names: list[str] = options.run
    if not options.data:
        raise InputError(f"evaluate: expected --data with the model {names[0]}, got none")
    others = options.initial or options.step or options.branch != "teacher"
    if others or options.subnets != ["all"]:
        raise InputError("evaluate: expected no --initial, --step, --branch or --subnets with a model")
    if (len(names) > 1 or names[0].startswith(TIMM)) and not options.out:
        raise InputError(f"evaluate: expected --out with {' '.join(names)}, got none")
    out = Path(options.out or evaluation_file(Path(names[0]), options.data, BRANCH, 0))
    plot = Path(options.plot) if options.plot else None
    reports = evaluate_models(
        names,
        options.data,
        protocols,
        device=options.device,
        out=out,
        plot=plot,
        folders=folders,
        baselines=options.baselines,
    )
    if is_main_process():
        tables = "\n\n".join(report.table() for report in reports)
        print(tables, *(file for file in (out, plot) if file), sep="\n")


def run_report(options: argparse.Namespace) -> None:
    if options.record and options.out:
        raise InputError("report: expected one of --out and --record, got both")
    folders = [RunFolder(Path(run)) for run in dict.fromkeys(options.run)]
    for folder in folders:
        folder.config()
    if options.record:
        out = Path(options.record)
        require_json(out, "--record", "band")
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
    space, rows = backbone.space, subnet_rows(backbone)
    if options.json:
        print(json.dumps(rows))
        return
    stages = "depth (blocks of each stage)" if len(space.intact.blocks) > 1 else "depth (blocks)"
    print(f"{len(rows)} subnets of a {backbone.kind}, named by width (channels) and {stages}")
    print(f"params: without projection heads. GFLOPs: a forward of one {backbone.image_size}-pixel image,")
    draws = sum(row["draws"] for row in rows)
    print(f"2 per multiply-add. draws: times it is the elastic student in a round of {draws} draws.")
    wide = max(9, *(len(row["subnet"]) for row in rows))
    print(f"{'subnet':>{wide}} {'params':>12} {'GFLOPs':>9} {'draws':>6}")
    for row in rows:
        size = f"{row['params']:>12,} {row['flops'] / 1e9:>9.3g}"
        print(f"{row['subnet']:>{wide}} {size} {row['draws']:>6}")


def _new_config(options: argparse.Namespace) -> Config:
    """Of a preset, a file or the run to start from, in this order; the quickstart's where none is named."""
    if options.preset and options.config:
        raise InputError("expected one of --preset and --config, got both")
    preset = options.preset
    if options.config:
        preset = from_dict(Config, read_json(Path(options.config), "config: expected a JSON file"))
    return _overridden(initial_config(preset, getattr(options, "init", None), options.overrides), options)


def _overridden(config: Config, options: argparse.Namespace) -> Config:
    """Apply `--data`, `--teacher`, `--device` and `KEY=VALUE` in this order."""
    if data := getattr(options, "data", None):
        config = with_data(config, data)
    config = with_teacher(config, getattr(options, "teacher", None))
    if device := getattr(options, "device", None):
        config = with_run(config, device=device)
    return override(config, options.overrides)
