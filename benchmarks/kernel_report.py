"""What every Triton kernel that a preset's steps launch needs of every architecture, without a GPU.

    python -m benchmarks.kernel_report            print the table; fail where a rule is broken
    python -m benchmarks.kernel_report --write    also replace the committed table

Launches are those of whole steps with the intact and the narrowest subnet, with and without masks, of an
evaluation, and of layers that no preset has, recorded for each architecture. The table is
`benchmarks/results/kernel_report.tsv`; a test compares it, so that a change is seen in review. The rules are
in `kernel_rules.py`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import elastic_kernels as ek
from benchmarks.assembly import ARCHITECTURES, Compiled
from benchmarks.kernel_rules import COLUMNS, Row, complaints
from elastic_kernels import absent_gpu, backend, planning
from elastic_kernels.absent_gpu import GPUS
from elastic_kernels.triton_ops.gemm import PERSISTENT
from elastic_kernels.triton_ops.recorded import Binary
from elastic_kernels.tuning import Key, power_of_2, tiles, trial
from poa.files import write_text
from poa.memory import planned_state
from poa.options import override
from poa.presets import preset
from poa.subnets import Subnet
from poa.warmup import warm_up_steps

TABLE = Path(__file__).parent / "results" / "kernel_report.tsv"
NAMES = tuple(f"sm_{number}" for number in ARCHITECTURES)
PRESETS = ("vit-l16", "swin-b", "resnet-152")


LAYERS = "layers"  # in place of a preset: those that none has


class Run(NamedTuple):
    """Steps whose launches are looked at; the preset may have changes after its name."""

    preset: str
    precision: str
    architecture: str


RUNS = (
    *(Run(name, "bf16", architecture) for architecture in NAMES for name in PRESETS),
    *(Run("vit-l16", precision, "sm_90") for precision in ("fp16", "fp32")),
    *(Run(f"vit-l16 method.backbone.head_dim={size}", "bf16", "sm_90") for size in (16, 32, 128)),
    Run("vit-l16 method.backbone.image_size=384 method.crops.global_size=384", "bf16", "sm_90"),
    *(Run(LAYERS, "bf16", architecture) for architecture in NAMES),
)


class Case(NamedTuple):
    """A binary, the steps that launch it first, and the programs of its largest grid there."""

    run: Run
    binary: Binary
    programs: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The first fields of its row, which say what it is."""
        binary, options = self.binary, self.binary.options
        words = (*self.run[:2], _name(binary), self.run.architecture, _form(binary), _types(binary))
        return *words, options["num_warps"], options["num_stages"]

    def row(self) -> Row:
        """Its row of the table; compiles it."""
        binary = Compiled.of(self.binary)
        processors = GPUS[self.run.architecture].processors
        waves = self.programs / processors / max(binary.blocks_per_processor, 1)
        matrix = ", ".join(f"{count} {name}" for name, count in binary.tensor_core.items()) or "-"
        loads, stores = (
            f"{max(sizes)}..{min(sizes)}" if sizes else "-" for sizes in binary.accesses.values()
        )
        read = (
            binary.registers, binary.spilled_bytes, binary.shared_bytes, binary.blocks_per_processor,
            round(waves, 2), binary.operands or "-", matrix, binary.waits, binary.duplicates,
            loads, stores, binary.narrow, binary.instructions,
        )  # fmt: skip
        return Row(*(*self.key, *read))


def _name(binary: Binary) -> str:
    return binary.name.strip("_").removesuffix("_kernel")


def _form(binary: Binary) -> str:
    """Its compile-time arguments and unaligned pointers, in words."""
    constants = {k: v for k, v in binary.constexprs.items() if v is not None and v is not False}
    words = [name if value is True else f"{name}={value}" for name, value in constants.items()]
    names = binary.kernel.arg_names
    for (place,), hints in binary.attributes.items():
        if binary.signature[names[place]].startswith("*") and not hints:
            words.append(f"unaligned:{names[place]}")
    return " ".join(words)


def _types(binary: Binary) -> str:
    pointers = [kind[1:] for kind in binary.signature.values() if kind.startswith("*")]
    runs = ((kind, len(list(same))) for kind, same in itertools.groupby(pointers))
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def launched(runs: Sequence[Run] = RUNS) -> list[Case]:
    """Every binary that the steps launch; of equal ones, that of the first run."""
    cases: dict[Any, Case] = {}
    for run in runs:
        with absent_gpu(run.architecture) as launches:
            (_run_layers if run.preset == LAYERS else _run_steps)(run)
        programs: dict[int, int] = {}
        for launch in launches.made:
            programs[id(launch.binary)] = max(programs.get(id(launch.binary), 0), launch.programs)
        for binary in launches.binaries:
            case = Case(run, binary, programs[id(binary)])
            cases.setdefault((case.key[2:], str(binary.signature), str(binary.attributes)), case)
    return list(cases.values())


def _run_steps(run: Run) -> None:
    name, *changes = run.preset.split()
    config = override(preset(name), [*changes, f"method.precision={run.precision}"])
    space = config.method.backbone.space
    warm_up_steps(Subnet(space.smallest.width, space.smallest.depth), config, planned_state(config))


def _run_layers(run: Run) -> None:
    """Blocks of today's ViTs, patches and a 1x1 convolution, 384 of 768 wide, and rows of several widths; an
    MLP that keeps its activations; products with persistent programs."""
    images, length, width = 64, 201, 768
    x = torch.empty(images * length, width // 2, device="meta", requires_grad=True)
    ends, widths = (torch.empty(n, dtype=torch.int64, device="meta") for n in (images + 1, len(x)))

    def block(
        dim: int, kind: type[ek.ElasticRMSNorm | ek.ElasticLayerNorm], mlp: ek.ElasticMLP | ek.ElasticSwiGLU
    ) -> ek.ElasticPreNormBlock:
        qk_norm = "rms" if kind is ek.ElasticRMSNorm else "layer"
        attn = ek.ElasticRotaryAttention(width, dim, heads=12, qk_norm=qk_norm)
        return ek.ElasticPreNormBlock(kind(width), attn, kind(width), mlp)

    with torch.device("meta"), backend("triton"), planning(torch.bfloat16):
        gated = block(64, ek.ElasticRMSNorm, ek.ElasticSwiGLU(width, 2048))
        gated(x, ends, rotary=_angles(x, 64, halves=False)).sum().backward()
        for activation in ("silu", "gelu_tanh"):
            plain = block(80, ek.ElasticLayerNorm, ek.ElasticMLP(width, 3072, activation=activation))
            plain(x, [(images, length)], rotary=_angles(x, 80, halves=True)).sum().backward()
            with torch.no_grad():
                plain.mlp(x)
                ek.mixed_width_mlp(plain.mlp, torch.empty(len(x), width), widths)
        whole = torch.empty(len(x), width, requires_grad=True)
        with ek.kept_activations():
            ek.ElasticMLP(width, 3072)(whole).sum().backward()
        maps = torch.empty(images, width // 2, 14, 14).to(memory_format=torch.channels_last)
        ek.ElasticConv1x1(width, width)(maps, width // 2).sum().backward()
        ek.ElasticPatchEmbed(16, width)(torch.empty(images, 3, 224, 224), width // 2).sum().backward()
        ek.mixed_width_block(gated, whole, [(images, length)], widths).sum().backward()
        weight, shape = torch.empty(width, width), (power_of_2(len(x)), tiles(width), tiles(width))
        room = 1024 * ARCHITECTURES[int(run.architecture.removeprefix("sm_"))].shared_of_block
        for c in PERSISTENT:
            if 2 * (c.block_m + c.block_n) * c.block_k * c.stages <= room:
                forms = ("residual_plain", "gelu", "dgrad_gelu")
                with trial({Key(form, torch.bfloat16, shape): c for form in forms}):
                    ek.elastic_linear_residual(whole, weight, None, whole)
                    ek.ElasticMLP(width, width)(whole).sum().backward()


def _angles(x: Tensor, dim: int, halves: bool) -> ek.Rotary:
    return ek.Rotary(torch.empty(len(x), dim), torch.empty(len(x), dim), halves)


def build(cases: Sequence[Case]) -> list[Row]:
    """Rows of the table. Compiles on all CPUs: a few minutes for all of it on two."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return pool.map(Case.row, cases, chunksize=4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    write = parser.parse_args(arguments).write
    torch.set_num_threads(1)
    rows = build(launched())
    lines = [f"# Triton {triton.__version__}", COLUMNS, *map(str, rows)]
    print("\n".join(lines))
    wrong = list(complaints(rows))
    for complaint in wrong:
        print("WRONG", complaint)
    if write:
        write_text(TABLE, "\n".join(lines) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
