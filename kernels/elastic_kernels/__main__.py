"""`python -m elastic_kernels [report | tune]`: the backend of each operator on this machine; its settings."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from elastic_kernels import dispatch, tuning
from elastic_kernels.attention import attention_backend
from elastic_kernels.crops import crops_backend
from elastic_kernels.group_norm import group_norm_backend
from elastic_kernels.layer_norm import layer_norm_backend
from elastic_kernels.linear import linear_backend
from elastic_kernels.optimizer import fused_adamw_backend
from elastic_kernels.qk_norm import qk_norm_backend
from elastic_kernels.tune import Call, compile_all, record, tune
from elastic_kernels.window_attention import window_attention_backend

LINEARS = (
    *("elastic_linear", "elastic_linear_residual", "elastic_qkv", "elastic_mlp", "elastic_mlp_half"),
    *("elastic_swiglu", "elastic_head_mlps", "elastic_embedding", "mixed_width_linear", "mixed_width_mlp"),
)
NORMS = ("elastic_layer_norm", "elastic_rms_norm", "mixed_width_layer_norm", "mixed_width_rms_norm")
ATTENTION = ("packed_attention", "elastic_attention_half", "mixed_width_attention", "mixed_width_block")
OTHERS = ("unit_rows", "koleo", "prototype_cross_entropy", "sinkhorn_scaling")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; wrong input is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m elastic_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(
        "report", help="print versions, device and the backend of each operator (the default command)"
    )
    tuner = commands.add_parser("tune", help="find the fastest settings of the kernels on this GPU")
    tuner.add_argument("--preset", required=True, help="preset of poa that gives the shapes, such as vit-l16")
    tuner.add_argument(
        "--steps",
        default="poa.memory:plan_preset",
        help="MODULE:FUNCTION that runs the preset's steps on meta tensors (default: %(default)s)",
    )
    tuner.add_argument("--images", type=int, help="images of a micro-batch (default: the preset's)")
    tuner.add_argument(
        "--minutes", type=float, default=9, help="minutes after which tuning stops (default: %(default)s)"
    )
    tuner.add_argument("--out", type=Path, help="table to write or extend (default: in the user's cache)")
    tuner.add_argument("--arch", help="compile alone, for an absent GPU architecture such as sm_90")
    tuner.add_argument(
        "--cache",
        type=Path,
        default=Path("triton-cache"),
        help="folder of the kernels compiled with --arch (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.command != "tune":
        report()
        return 0
    try:
        for line in _compile(options) if options.arch else _tune(options):
            print(line, flush=True)
    except (OSError, ValueError) as error:
        print(f"elastic_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


def _compile(options: argparse.Namespace) -> Iterator[str]:
    yield from compile_all(_calls(options), options.arch, options.cache)
    yield (
        f"with Triton {importlib.metadata.version('triton')}, which is needed to use them: "
        f"TRITON_CACHE_DIR={options.cache} python -m elastic_kernels tune --preset {options.preset}"
    )


def _tune(options: argparse.Namespace) -> Iterator[str]:
    if not torch.cuda.is_available() or not dispatch.HAS_TRITON:
        lacks = "no GPU" if dispatch.HAS_TRITON else "no Triton"
        raise ValueError(f"tune: expected a GPU and Triton, got {lacks}")
    device = torch.device("cuda", torch.cuda.current_device())
    path, started = options.out or tuning.cache_file(tuning.gpu_name(device)), time.monotonic()
    calls = _calls(options)
    yield f"{len(calls)} different calls in the steps of {options.preset}; table: {path}"
    yield from tune(calls, path, options.minutes - (time.monotonic() - started) / 60, device)


def _calls(options: argparse.Namespace) -> Counter[Call]:
    """What the steps of a preset call."""
    module, _, name = options.steps.partition(":")
    try:
        steps = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--steps: expected MODULE:FUNCTION, got {options.steps}: {error}") from error
    with record() as calls:
        steps(options.preset, options.images)
    return calls


def report() -> None:
    """Print versions, the device, and the backend that each operator would take."""
    for package in ("torch", "triton", "xformers"):
        there = importlib.util.find_spec(package) is not None
        print(f"{package:<10} {importlib.metadata.version(package) if there else 'not installed'}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{'device':<10} {torch.cuda.get_device_name() if cuda else 'cpu'}")
    if cuda and dispatch.HAS_TRITON:
        table = tuning.table_of(torch.device("cuda", torch.cuda.current_device()))
        print(f"{'settings':<10} {f'{len(table)} timed' if table else 'none timed: see tune --help'}")
    dtype = torch.bfloat16 if cuda else torch.float32
    print(f"\nbackends for {dtype} on {device.type}:")
    x = torch.empty(197, 384, dtype=dtype, device=device)
    choices = {op: linear_backend(op, x) for op in LINEARS}
    choices |= {op: layer_norm_backend(x, op) for op in NORMS}
    choices |= {op: attention_backend(x, [(1, 197)], 64) for op in ATTENTION}
    choices["qk_norm"] = qk_norm_backend(x.view(197, 3, 2, 64))
    choices["window_attention"] = window_attention_backend(x, 7, 16)
    choices["elastic_group_norm"] = group_norm_backend(x, 32)
    choices |= {op: dispatch.choose(op, x) for op in OTHERS}
    choices["FusedAdamW"] = fused_adamw_backend(x.float())
    choices["render_crops"] = crops_backend(x)
    for op, choice in choices.items():
        print(f"  {op:<29} {choice.backend:<11} {choice.reason}")


if __name__ == "__main__":
    raise SystemExit(main())
