"""What every Triton kernel needs on every kind of part, compiled without a GPU.

    python -m benchmarks.kernel_report            print the table; fail on a spill or an exceeded limit
    python -m benchmarks.kernel_report --write    also replace the committed table

The table is `benchmarks/results/kernel_report.tsv`; a test compares it, so that a change is seen in review.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from benchmarks.aot import PARTS, Compiled, compile_kernel
from elastic_kernels.triton_ops import (
    attention,
    crops,
    gemm,
    group_norm,
    heads,
    layer_norm,
    linear,
    linear_wgrad,
    optimizer,
    prototypes,
    sinkhorn,
    window_attention,
)
from poa.files import write_text

TABLE = Path(__file__).parent / "results" / "kernel_report.tsv"
COLUMNS = (
    "kernel", "form", "part", "dtype", "settings", "registers", "spilled_bytes", "shared_bytes",
    "blocks_per_processor", "matrix_instructions", "wide_loads", "wide_stores", "instructions",
)  # fmt: skip
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {part: ("bf16", "fp32", *(("fp16",) if part in (90, 100) else ())) for part in PARTS}
WIDTHS = (1024, 384)  # of the intact ViT-L and of its narrowest subnet: a wide tile and a narrow one


@dataclass(frozen=True)
class Case:
    """A kernel with its settings, and what is asked of it.

    Attributes:
        kernel: the `triton.jit` function.
        form: which of its fusions are on.
        part: compute capability times ten.
        dtype: of the operands.
        settings: launch settings in words.
        constants, pointers, floats, odd, warps, stages: as in `compile_kernel`.
        blocks: that are meant to run on a multiprocessor at once.
        matrix: whether it multiplies matrices.
        rows: whether it streams rows, in accesses of 16 bytes.
    """

    kernel: Any
    form: str
    part: int
    dtype: str
    settings: str
    constants: dict[str, Any]
    pointers: dict[str, str]
    floats: tuple[str, ...]
    odd: tuple[str, ...]
    warps: int
    stages: int
    blocks: int = 1
    matrix: bool = False
    rows: bool = False

    @property
    def key(self) -> str:
        name = self.kernel.fn.__name__.strip("_").removesuffix("_kernel")
        return "\t".join((name, self.form, f"sm_{self.part}", self.dtype, self.settings))

    def compile(self) -> Compiled:
        return compile_kernel(
            self.kernel,
            self.part,
            pointer_dtype=self.dtype,
            pointers=self.pointers,
            floats=self.floats,
            constants=self.constants,
            odd=self.odd,
            warps=self.warps,
            stages=self.stages,
        )

    def complaints(self, result: Compiled) -> list[str]:
        """What is wrong with the result."""
        limit, found = PARTS[self.part].shared_of_block * 1024, []
        if result.spilled_bytes:
            found.append(f"spills {result.spilled_bytes} bytes")
        if result.shared_bytes > limit:
            found.append(f"needs {result.shared_bytes} bytes of shared memory, the part has {limit}")
        if result.blocks_per_processor < self.blocks:
            found.append(f"{result.blocks_per_processor} blocks fit, meant were {self.blocks}")
        if self.matrix and self.dtype != "fp32":
            wanted = {90: "wgmma", 100: "tcgen05"}.get(self.part, "mma")
            if wanted not in result.tensor_core and "small tile" not in self.settings:
                found.append(f"no {wanted} instruction")
        elif result.tensor_core:
            found.append(f"unwanted matrix instructions {result.tensor_core}")
        if self.rows and not (result.wide_loads and result.wide_stores):
            found.append("no accesses of 16 bytes")
        return found


def row(case: Case, result: Compiled) -> str:
    """A line of the table."""
    matrix = ", ".join(f"{count} {name}" for name, count in result.tensor_core.items()) or "none"
    numbers = (
        result.registers, result.spilled_bytes, result.shared_bytes, result.blocks_per_processor, matrix,
        result.wide_loads, result.wide_stores, result.instructions,
    )  # fmt: skip
    return "\t".join((case.key, *map(str, numbers)))


def cases() -> list[Case]:
    """Every kernel in every committed setting, for every part and dtype; each once."""
    found: dict[str, Case] = {}
    for part, dtypes in DTYPES.items():
        for dtype in dtypes:
            for family in (
                _gemm_cases, _row_cases, _attention_cases, _window_cases, _group_norm_cases, _prototype_cases,
            ):  # fmt: skip
                found |= {case.key: case for case in family(part, dtype)}
        for of_part in (_optimizer_cases, _crop_cases):
            found |= {case.key: case for case in of_part(part)}
    return list(found.values())


def _gemm_cases(part: int, dtype: str) -> Iterator[Case]:
    """As in training: products in `dtype`; residual stream, gradients and vectors in fp32."""
    everything = {"HAS_GAMMA": True, "HAS_INDEX": True, "HAS_ROW_SCALE": True}
    nothing = {"HAS_GAMMA": False, "HAS_INDEX": False, "HAS_ROW_SCALE": False}
    none = dict.fromkeys(("gamma_ptr", "index_ptr", "row_scale_ptr", "residual_ptr"))
    fwd, dgrad, wgrad = (
        linear._linear_fwd_kernel,
        linear._linear_dgrad_kernel,
        linear_wgrad._linear_wgrad_kernel,
    )
    summed = {"HAS_BIAS": True, "HAS_GAMMA": True}
    forms: list[tuple[gemm.Form, str, Any, dict[str, Any]]] = [
        ("linear", "bias", fwd, {"EPILOGUE": "linear", "act_ptr": None, **none, **nothing}),
        ("gelu", "bias, gelu", fwd, {"EPILOGUE": "gelu", **none, **nothing}),
        ("residual", "bias, residual rows", fwd, {"EPILOGUE": "residual", "act_ptr": None, **everything}),
        ("dgrad", "plain", dgrad, {"EPILOGUE": "none", "HAS_GAMMA": False, "u_ptr": None, "act_ptr": None,
                                   "gamma_ptr": None}),
        ("dgrad", "gamma", dgrad, {"EPILOGUE": "none", "HAS_GAMMA": True, "u_ptr": None, "act_ptr": None}),
        ("dgrad_gelu", "gamma, gelu", dgrad, {"EPILOGUE": "gelu", "HAS_GAMMA": True}),
        ("wgrad", "bias, gamma", wgrad, {"SPLIT": False, "partial_ptr": None, **summed}),
        ("wgrad", "bias, split", wgrad, {"SPLIT": True, **summed}),
    ]  # fmt: skip
    fp32 = (
        "bias_ptr", "gamma_ptr", "row_scale_ptr", "residual_ptr", "dweight_ptr", "bias_shares_ptr",
        "gamma_shares_ptr", "partial_ptr",
    )  # fmt: skip
    for form, name, kernel, constants in forms:
        pointers = dict.fromkeys(fp32, "fp32") | {"index_ptr": "i64"}
        if form == "residual":
            pointers["y_ptr"] = "fp32"
        for width in WIDTHS:
            config = gemm.gemm_config(form, width, ITEMSIZE[dtype], divmod(part, 10))
            launch = gemm.launch_options(config)
            blocks = {k: v for k, v in launch.items() if not k.startswith("num_")}
            bias = {"HAS_BIAS": True} if kernel is fwd else {}
            settings = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.warps} warps"
            yield Case(
                kernel, name, part, dtype, f"{settings}, {config.stages} stages",
                {"stride_wk": 1, "PRECISION": "ieee", **bias, **constants, **blocks}, pointers,
                ("scale",), ("rows", "split_rows", "groups"), config.warps, config.stages, matrix=True,
            )  # fmt: skip


def _row_cases(part: int, dtype: str) -> Iterator[Case]:
    """LayerNorm of an fp32 stream into `dtype`, and the passes over rows and over weights of the products."""
    vectors = ("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "shares_ptr")
    streams = ("x_ptr", "residual_ptr", "dsum_ptr", "dx_ptr", "dout_ptr")
    pointers = dict.fromkeys((*vectors, *streams), "fp32")
    pointers |= {"index_ptr": "i64", "position_ptr": "i32"}
    forward, backward = layer_norm._layer_norm_fwd_kernel, layer_norm._layer_norm_bwd_kernel
    gather = {"HAS_AFFINE": True, "HAS_INDEX": True}
    forms: list[tuple[Any, str, dict[str, Any]]] = [
        (forward, "rows", {**gather, "KEEP_XHAT": True}),
        (backward, "rows, stream", {**gather, "IN_STREAM": True, "x_ptr": None, "mean_ptr": None}),
    ]
    for config in layer_norm.CONFIGS:
        for kernel, form, constants in forms:
            yield Case(
                kernel, form, part, dtype, f"{config.rows}x{config.block}, {config.warps} warps",
                {"ROWS": config.rows, "BLOCK": config.block, **constants}, pointers,
                ("eps",), ("rows", "tokens"), config.warps, 3, rows=True,
                blocks=layer_norm.PROGRAMS_PER_SM if config.block <= 1024 else 1,
            )  # fmt: skip
    affine = {"ROWS": layer_norm.AFFINE_ROWS, "BLOCK": layer_norm.AFFINE_BLOCK}
    yield Case(
        layer_norm._layer_norm_affine_kernel, "shares", part, dtype,
        f"{layer_norm.AFFINE_ROWS}x{layer_norm.AFFINE_BLOCK}, 4 warps", affine,
        {**pointers, "dweight_ptr": "fp32", "dbias_ptr": "fp32"}, (), ("programs",), 4, 3,
    )  # fmt: skip
    tile = {"ROWS": linear.COPY_ROWS, "BLOCK": linear.COPY_BLOCK}
    yield Case(
        linear._branch_grad_kernel, "rows", part, dtype, f"{linear.COPY_ROWS}x{linear.COPY_BLOCK}, 4 warps",
        {"HAS_INDEX": True, "HAS_ROW_SCALE": True, **tile}, {**pointers, "row_scale_ptr": "fp32"},
        (), ("rows",), 4, 3, rows=True, blocks=4,
    )  # fmt: skip
    block_n, block_k = linear_wgrad.FINISH_BLOCKS
    yield Case(
        linear_wgrad._linear_wgrad_finish_kernel, "gamma", part, dtype,
        f"{block_n}x{block_k}, 4 warps",
        {"HAS_GAMMA": True, "BLOCK_N": block_n, "BLOCK_K": block_k, "stride_wk": 1},
        dict.fromkeys(("partial_ptr", "gamma_ptr", "dweight_ptr", "gamma_shares_ptr"), "fp32"),
        (), ("splits",), 4, 3, rows=True,
    )  # fmt: skip
    vector = linear_wgrad.VECTOR_BLOCK
    yield Case(
        linear_wgrad._linear_vector_grads_kernel, "bias, gamma", part, dtype, f"{vector}, 4 warps",
        {"HAS_BIAS": True, "HAS_GAMMA": True, "BLOCK": vector},
        dict.fromkeys(linear_wgrad._linear_vector_grads_kernel.arg_names, "fp32"),
        (), ("splits", "tiles"), 4, 3,
    )  # fmt: skip


def _attention_cases(part: int, dtype: str) -> Iterator[Case]:
    """Every length class at head_dim 64; other head sizes on one part, to keep the table short."""
    capability = divmod(part, 10)
    for head_dim in (16, 32, 64, 128) if (part, dtype) == (90, "fp16") else (64,):
        configs = [
            attention.fwd_config(n, head_dim, ITEMSIZE[dtype], capability) for n in (37, 128, 197, 600)
        ]
        forwards = [
            (
                attention._attention_resident_fwd_kernel
                if c.resident
                else attention._attention_streaming_fwd_kernel,
                c,
            )
            for c in configs
        ]
        backward = (
            attention._attention_bwd_kernel,
            attention.bwd_config(head_dim, ITEMSIZE[dtype], capability),
        )
        for kernel, config in (*forwards, backward):
            settings = f"{config.block_m}x{config.block_n}, {config.warps} warps, {config.stages} stages"
            if config.block_m < 64:
                settings += ", small tile"  # the largest matrix instructions take 64 rows
            yield Case(
                kernel, f"head_dim {head_dim}", part, dtype, settings,
                {"HEAD_DIM": head_dim, "BLOCK_D": heads.head_block(head_dim), "BLOCK_M": config.block_m,
                 "BLOCK_N": config.block_n, "PRECISION": "ieee"},
                {"lse_ptr": "fp32"}, ("scale", "scale_log2"), ("first_token", "length", "heads"),
                config.warps, config.stages, matrix=True,
                blocks=1 if dtype == "fp32" else 2,
            )  # fmt: skip


def _window_cases(part: int, dtype: str) -> Iterator[Case]:
    """Swin's windows of 7 and 8, whose tile is the same, and small ones."""
    for side in (7, 4) if part == 90 else (7,):
        block = window_attention.window_block(side)
        constants = {
            **{"HEAD_DIM": 16, "BLOCK_D": 16, "SIDE": side, "BLOCK": block, "PRECISION": "ieee"},
            **{"LOG2": attention.LOG2_E, "MASK_VALUE": -100 * attention.LOG2_E},
        }
        names = ("bias_ptr", "lse_ptr", "dbias_ptr", "dpad_ptr")
        for kernel in (
            window_attention._window_attention_fwd_kernel,
            window_attention._window_attention_bwd_kernel,
        ):
            backward = kernel is window_attention._window_attention_bwd_kernel
            warps = window_attention.window_warps(side, ITEMSIZE[dtype], backward)
            settings = f"{block}x{block}, {warps} warps" + (", small tile" if block < 64 else "")
            yield Case(
                kernel, f"window {side}", part, dtype, settings,
                constants, dict.fromkeys(names, "fp32"), ("scale", "scale_log2"),
                tuple(kernel.do_not_specialize), warps, 1, matrix=True,
            )  # fmt: skip


def _group_norm_cases(part: int, dtype: str) -> Iterator[Case]:
    """Groups of 2, 3 and 64 channels, of ResNet-152's narrowest and widest norms."""
    vectors = ("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "shares_ptr")
    for per_group in (2, 3, 64):
        config = group_norm.group_config(32, per_group)
        tile = {"ROWS": config.rows, "GROUPS": config.groups, "PER_GROUP": config.per_group}
        forms: tuple[tuple[Any, dict[str, Any]], ...] = (
            (group_norm._group_norm_fwd_kernel, {"HAS_RESIDUAL": True}),
            (group_norm._group_norm_bwd_kernel, {"KEEP_RESIDUAL": True}),
        )
        for kernel, form in forms:
            yield Case(
                kernel, f"residual, ReLU, groups of {per_group}", part, dtype,
                f"{config.rows}x{config.groups}x{config.per_group}, {config.warps} warps",
                {"RELU": True, **form, **tile}, dict.fromkeys(vectors, "fp32"), ("eps",),
                ("rows", "per_group") if per_group % 16 else ("rows",), config.warps, 3, blocks=4,
            )  # fmt: skip


def _prototype_cases(part: int, dtype: str) -> Iterator[Case]:
    """Losses of both students, and the passes of Sinkhorn over teacher logits of the same dtype."""
    vectors = ("log_u_ptr", "log_v_ptr", "stats_ptr", "lse_ptr", "grad_ptr", "largest_ptr")
    pointers = dict.fromkeys(vectors, "fp32") | {"index_ptr": "i64"}
    config = prototypes.loss_config(ITEMSIZE[dtype], divmod(part, 10))
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    settings = f"{config.block_m}x{config.block_n}x{config.block_d}, {config.warps} warps"
    settings += f", {config.stages} stages" + (", small tile" if config.block_m < 64 else "")
    for kernel in (prototypes._losses_fwd_kernel, prototypes._losses_bwd_kernel):
        yield Case(
            kernel, "prototypes, two students", part, dtype, settings,
            {"TWO": True, "PRECISION": "ieee", **blocks}, pointers,
            ("inv_tau_s", "inv_tau_t", "dz_scale"), ("rows", "span", "start", "width"),
            config.warps, config.stages, matrix=True,
        )  # fmt: skip
    table = ("stride", "rows", "prototypes", "first_row", "first_prototype", "stats_at", "starts", "logits")
    pointers = dict.fromkeys((*vectors, "largest_ptr", "sums_ptr"), "fp32")
    pointers |= dict.fromkeys((f"{name}_ptr" for name in table), "i64")
    logits = {
        "P": 8,
        "EVEN": True,
        "T": getattr(tl, {"fp32": "float32", "fp16": "float16"}.get(dtype, "bfloat16")),
    }
    passes: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (sinkhorn._row_pass_kernel, "prototypes", _tile(*sinkhorn.ROW_PASS) | logits),
        (
            sinkhorn._column_pass_kernel,
            "prototypes",
            _tile(*sinkhorn.COLUMN_PASS) | logits | {"HAS_V": True, "SPAN": sinkhorn.SPAN},
        ),
        (sinkhorn._column_merge_kernel, "spans", {"P": 8, "SPAN": sinkhorn.SPAN, "BLOCK": sinkhorn.MERGE}),
    )
    for kernel, form, constants in passes:
        size = "x".join(str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK") if k in constants)
        yield Case(
            kernel, form, part, dtype, f"{size}, 4 warps", constants, pointers,
            ("inv_tau",), ("problems",), 4, 3, blocks=2,
        )  # fmt: skip


def _tile(rows: int, columns: int) -> dict[str, Any]:
    return {"BLOCK_M": rows, "BLOCK_N": columns}


def _optimizer_cases(part: int) -> Iterator[Case]:
    """A step of tensors found by address, all in fp32."""
    launch = {"CHUNK": optimizer.CHUNK, "BLOCK": optimizer.BLOCK}
    names = optimizer._adamw_kernel.arg_names + optimizer._adamw_coefficients_kernel.arg_names
    pointers = {name: "i64" for name in names if name.endswith("s_ptr")}
    pointers |= {"numel_ptr": "i64", "group_ptr": "i64", "part_ptr": "i64", "chunks_ptr": "i32"}
    pointers |= dict.fromkeys(("clips_ptr", "steps_ptr", "trains_ptr", "eps_ptr", "group_eps_ptr"), "fp32")
    rates = ("lr_ptr", "weight_decay_ptr", "beta1_ptr", "beta2_ptr", "group_eps_ptr")
    pointers |= dict.fromkeys(rates, "fp64") | {"finite_ptr": "i1"}
    settings = f"chunks of {optimizer.CHUNK}, {optimizer.BLOCK}, {optimizer.WARPS} warps"
    kernels: tuple[tuple[Any, str, dict[str, Any], bool], ...] = (
        (optimizer._adamw_norms_kernel, settings, {"ALIGNED": True, **launch}, False),
        (optimizer._adamw_kernel, settings, {"ALIGNED": True, **launch}, True),
        (optimizer._adamw_coefficients_kernel, "4 warps", {"TENSORS": optimizer.TENSORS}, False),
    )
    for kernel, how, constants, rows in kernels:
        yield Case(
            kernel, "optimizer", part, "fp32", how, constants, pointers,
            ("one_minus_momentum",), ("tensors",), 4 if "TENSORS" in constants else optimizer.WARPS, 3,
            rows=rows, blocks=2,
        )  # fmt: skip


def _crop_cases(part: int) -> Iterator[Case]:
    """Sizes that 16 divides; fp16 between kernels, bf16 at the end."""
    pointers = {"images_ptr": "u8", "table_ptr": "fp32", "out_ptr": "bf16"}
    odd = ("batch", "tiles_y", "tiles_x", "taps", "stride_b", "stride_c", "stride_h")
    tiled: tuple[tuple[Any, crops.TileConfig, tuple[str, ...], bool], ...] = (
        (crops._crops_horizontal_kernel, crops.HORIZONTAL, ("size",), False),
        (crops._crops_vertical_kernel, crops.VERTICAL, (), True),
        (crops._crops_blur_kernel, crops.BLUR, (), False),
        (crops._crops_finish_kernel, crops.FINISH, (), True),
    )
    for kernel, config, unknown, rows in tiled:
        yield Case(
            kernel, "crops", part, "fp16", f"{config.rows}x{config.block}, {config.warps} warps",
            {"ROWS": config.rows, "BLOCK": config.block}, pointers,
            (), odd + unknown, config.warps, 3, rows=rows, blocks=4,
        )  # fmt: skip
    yield Case(
        crops._crops_colour_kernel, "crops", part, "fp16",
        f"{crops.COLOUR_BLOCK}, {crops.COLOUR_WARPS} warps", {"BLOCK": crops.COLOUR_BLOCK}, pointers,
        (), (), crops.COLOUR_WARPS, 3, blocks=2,
    )  # fmt: skip


def _report(case: Case) -> tuple[str, list[str]]:
    result = case.compile()
    return row(case, result), case.complaints(result)


def build() -> tuple[list[str], dict[str, list[str]]]:
    """The table's lines, and what is wrong with which case. Compiles on all CPUs: about a minute on two."""
    context = multiprocessing.get_context("forkserver")
    count = len(cases())
    with context.Pool(os.cpu_count()) as pool:
        results = pool.map(_report_number, range(count), chunksize=4)
    lines = [line for line, _ in results]
    wrong = {case.key: c for case, (_, c) in zip(cases(), results, strict=True) if c}
    return [f"# Triton {triton.__version__}", "\t".join(COLUMNS), *lines], wrong


def _report_number(number: int) -> tuple[str, list[str]]:
    """By number: kernels do not travel between processes."""
    return _report(cases()[number])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    write = parser.parse_args(arguments).write
    lines, wrong = build()
    for line in lines:
        print(line.expandtabs(4))
    for key, complaints in wrong.items():
        print("WRONG", key.replace("\t", " "), "; ".join(complaints))
    if write:
        write_text(TABLE, "\n".join(lines) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
