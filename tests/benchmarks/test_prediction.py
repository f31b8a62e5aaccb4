"""What the compiled code promises of a step: evaluated programs, simulated code, products, the table."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.assembly import Compiled
from benchmarks.prediction import options, report
from benchmarks.prediction.costs import Cost, kernel_cost, operator_cost
from benchmarks.prediction.gpus import KNOWN, LAUNCH, Gpu
from benchmarks.prediction.machine import MEMORY, parse, simulate
from benchmarks.prediction.programs import Extent, work_of
from benchmarks.prediction.trace import Operator, PersistentPrograms, Recorder
from elastic_kernels import absent_gpu, dispatch, elastic_linear, sinkhorn_scaling
from elastic_kernels.tuning import trial
from poa.config import Config
from poa.memory import predict_memory
from poa.options import override
from poa.presets import preset
from poa.subnets import Subnet

pytest.importorskip("triton")
H200 = KNOWN["h200"]

# Programs take their rows from a table; a row of 100 columns in steps of 64, and the last program nothing.
TTIR = """module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16> loc("x"), %rows_ptr: !tt.ptr<i32>, %columns: i32) attributes {} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c2_i32 = arith.constant 2 : i32 loc(#loc1)
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %at = tt.addptr %rows_ptr, %pid : !tt.ptr<i32>, i32 loc(#loc1)
    %rows = tt.load %at : !tt.ptr<i32> loc(#loc1)
    %offs = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc1)
    %x = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#loc1)
    %some = arith.cmpi slt, %pid, %c2_i32 : i32 loc(#loc1)
    scf.if %some {
      %last = scf.for %row = %c0_i32 to %rows step %c1_i32 iter_args(%xs = %x) -> (tensor<64x!tt.ptr>) : i32 {
        scf.for %start = %c0_i32 to %columns step %c64_i32  : i32 {
          %starts = tt.splat %start : i32 -> tensor<64xi32> loc(#loc1)
          %offs_1 = arith.addi %starts, %offs : tensor<64xi32> loc(#loc1)
          %xs_1 = tt.addptr %xs, %offs_1 : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc1)
          %y = tt.load %xs_1 : tensor<64x!tt.ptr<bf16>> loc(#loc1)
          tt.store %xs_1, %y : tensor<64x!tt.ptr<bf16>> loc(#loc1)
        } loc(#loc1)
        scf.yield %xs : tensor<64x!tt.ptr<bf16>> loc(#loc1)
      } loc(#loc1)
    } else {
      %end = tt.splat %c2_i32 : i32 -> tensor<64xi32> loc(#loc1)
      %mask = arith.cmpi slt, %offs, %end : tensor<64xi32> loc(#loc1)
      %z = tt.load %x, %mask : tensor<64x!tt.ptr<bf16>> loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
}
"""


def test_programs_are_evaluated_on_their_arguments() -> None:
    table = Extent(12, np.array([3, 5, 7]).tobytes())
    work = work_of(TTIR, (3, 1, 1), {"x_ptr": Extent(10**6), "rows_ptr": table, "columns": 100})
    assert (work.trips, work.nesting, work.unknown) == ([(3 + 5) / 3, (2 + 2) / 3], [0, 1], 0)
    assert work.loaded == {"%x_ptr": ((3 + 5) * 2 * 64 + 2) * 2 / 3, "%rows_ptr": 4}
    assert work.stored == {"%x_ptr": (3 + 5) * 2 * 64 * 2 / 3}
    of_data = work_of(TTIR, (3, 1, 1), {"x_ptr": Extent(10**6), "rows_ptr": Extent(12), "columns": 100})
    assert of_data.unknown == 1


def test_tiles_of_tensor_descriptors_are_counted() -> None:
    ttir = """module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16>, %rows: i32) attributes {} {
    %c0 = arith.constant 0 : i32
    %tiles = tt.make_tensor_descriptor %x_ptr, [%rows, %rows], [%rows, %rows] : <bf16>, <tensor<8x16xbf16>>
    %x = tt.descriptor_load %tiles[%c0, %c0] : !tt.tensordesc<tensor<8x16xbf16>> -> tensor<8x16xbf16>
    tt.return
  }
}
"""
    assert work_of(ttir, (1, 1, 1), {"x_ptr": Extent(10**6), "rows": 64}).loaded == {"%x_ptr": 8 * 16 * 2}


def sass(*code: tuple[str, int] | str) -> str:
    """As nvdisasm prints it, of labels and instructions; the number is the high word of an instruction."""
    lines = [
        f"{item}:"
        if isinstance(item, str)
        else f"        /*{16 * i:04x}*/  {item[0]} ;  /* 0x0000000000000000 */\n    /* 0x{item[1]:016x} */"
        for i, item in enumerate(code)
    ]
    return "\n".join(lines)


def control(stall: int, sets: int = 7, waits: int = 0) -> int:
    return (stall | sets << 5 | 7 << 8 | waits << 11) << 41


CODE = sass(
    ("LDG.E.128 R4, desc[UR4][R2.64]", control(1, sets=0)),
    ".L_x_0",
    ("FFMA R8, R4, R4, R8", control(4, waits=1)),
    ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", control(2)),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", control(2)),
    ("@P0 BRA `(.L_x_0)", control(5)),
    ("EXIT", control(5)),
)


def test_code_waits_for_memory_and_matrix_units() -> None:
    code = parse(CODE)
    once, often = (simulate(code, 4, [trips], 1.0) for trips in (1.0, 1000.0))
    assert MEMORY < once.alone < MEMORY + 200
    assert often.busy["tensor"] == 1000 * 128
    assert (often.alone - once.alone) / 999 == pytest.approx(4 + 2 + 128 - 2 + 2 + 5, abs=4)
    assert simulate(code, 8, [1000.0], 1.5).busy["tensor"] == 2 * 1.5 * 1000 * 128
    assert simulate(code, 4, [2.5], 1.0).alone == pytest.approx(once.alone + 1.5 * 137, abs=10)


LOAD = ("@P0 SYNCS.ARRIVE.TRANS64 RZ, [UR4], R2", control(1))
POLL = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", control(1))
LOOP = (
    ".L_x_0",
    POLL,
    ("@!P0 BRA `(.L_x_2)", control(5)),
    ".L_x_3",
    ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", control(2)),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", control(2)),
    LOAD,
    ("@P2 BRA `(.L_x_1)", control(5)),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", control(2)),
    ("MUFU.EX2 R8, R8", control(4)),
    ".L_x_1",
    ("@P1 BRA `(.L_x_0)", control(5)),
    ("EXIT", control(5)),
    ".L_x_2",
    POLL,
    ("@!P0 BRA `(.L_x_2)", control(5)),
    ("BRA `(.L_x_3)", control(5)),
)


def test_a_flattened_loop_is_tiles_of_steps() -> None:
    """Three tiles of ten steps, of which the last has an epilogue; one or six loads are on their way."""
    code = parse(sass(LOAD, *LOOP), flattened=True)
    assert [depth for depth, _ in code.loops()] == [0, 1]
    late, early = (simulate(parse(sass(*[LOAD] * n, *LOOP), True), 4, [3.0, 9.0], 1.0) for n in (1, 6))
    assert late.busy["tensor"] == early.busy["tensor"] == 3 * 10 * 128
    assert late.busy["mufu"] == 3 * 8
    assert late.alone == pytest.approx(30 * MEMORY, rel=0.05)
    assert MEMORY + 30 * 128 < early.alone < MEMORY + 30 * 128 + 3 * 128


@pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter has no launches to record")
def test_persistent_programs_make_tiles_in_turn() -> None:
    """300 tiles of 4 steps by 264 programs, the first and the 133rd of which share a processor: 3 tiles."""
    with absent_gpu() as launches, Recorder() as recorder, trial(PersistentPrograms(2)):
        launches.keep_arguments = True
        x, weight = (torch.empty(n, 200, dtype=torch.bfloat16, device="meta") for n in (12_800, 384))
        elastic_linear(x, weight, activation="gelu")
        (kernel,) = recorder.kernels(launches.made)
    compiled, arguments = Compiled.of(kernel.binary), dict(kernel.arguments)
    work = work_of(compiled.ttir, kernel.grid, arguments, (0, 132))
    assert (kernel.grid, work.trips, work.flattened) == ((264, 1, 1), [(2 + 1) / 2, 4], True)
    cost = kernel_cost(kernel, 1, compiled, H200)
    assert (cost.name, cost.waves, cost.blocks, cost.guessed) == ("linear_persistent", 1.0, 2, 0)
    products = 3 * 4 * 4 * 2  # of 64 x 128 x 16, a scheduler's
    assert cost.resources["tensor"] * H200.clock == pytest.approx(products * 64 * H200.tensor_cycles)


def test_products_take_whole_waves() -> None:
    wave = H200.product(1, 128 * 132, 256, 512, 2)
    assert H200.product(1, 128 * 131, 256, 512, 2) == wave
    assert H200.product(1, 128 * 264, 256, 512, 2) == pytest.approx(2 * wave)
    assert H200.product(1, 8192, 8192, 8192, 2) == pytest.approx(2 * 8192**3 / H200.ceilings.matmul, rel=0.1)
    cost = operator_cost(Operator("cuBLAS", "mm", 1, 10**6, ((1, 8192, 8192, 8192, 2),)), H200)
    assert (cost.bound, cost.seconds) == ("tensor", pytest.approx(LAUNCH + cost.resources["tensor"]))


@pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter has no launches to record")
def test_launches_keep_their_arguments_and_what_the_host_wrote() -> None:
    logits = [torch.empty(rows, 256, dtype=torch.float16, device="meta") for rows in (9, 30)]
    with absent_gpu() as launches, Recorder() as recorder:
        launches.keep_arguments = True
        sinkhorn_scaling(logits, 0.07, 2)
        torch.empty(8, 64, device="meta") @ torch.empty(64, 16, device="meta")
        kernels = recorder.kernels(launches.made)
    (passed,) = [kernel for kernel in kernels if kernel.binary.name == "_row_pass_kernel"]
    arguments = dict(passed.arguments)
    assert np.frombuffer(arguments["rows_ptr"].content, np.int64)[:2].tolist() == [9, 30]
    assert (arguments["problems"], arguments["log_u_ptr"]) == (2, Extent(4 * 512))
    assert recorder.operators[-1] == Operator("cuBLAS", "mm", 1, 4 * (512 + 1024 + 128), ((1, 8, 16, 64, 4),))


def test_what_was_measured_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"gpu": "NVIDIA H200", "provider": "ours", "shape": "1024x24 64 images", "mode": "640x18"}
    lines = ["x", "    1.500 ms   1.0%     84 x  norms 80.0% of floor             _layer_norm_fwd_kernel"]
    rows = [{**place, "op": "profile", "lines": lines}, {**place, "op": "step", "images_per_s": 212.5}]
    monkeypatch.setattr(results, "load", lambda paths: rows)
    costs = [Cost("layer_norm_fwd", "", 84, 9.0, 8, {"memory": 1e-3}, 2e-3), Cost("add", "other", 9)]
    table, summary = report(costs, H200, "1024x24", "640x18", 64)
    assert summary == {"step_ms": 2.0, "images_per_s": 32000.0}
    assert table[2].split()[:4] == ["2.00", "1.50", "84", "9.0"]
    assert table[-1].endswith("93 launches: 32000.0 images/s; measured 212.5")


def test_options_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the command, with costs that its options decide; memory is that of `poa memory`."""

    def costs(config: Config, elastic: Subnet, gpus: Sequence[Gpu]) -> list[list[Cost]]:
        performance = config.performance
        return [[Cost("a", "", 1, seconds=(3 + performance.recompute) / gpu.processors)] for gpu in gpus]

    monkeypatch.setattr(options, "step_costs", costs)
    assert main(["options", "--preset", "quickstart", "--subnet", "64x3"]) == 0
    about, head, _, *lines, last = capsys.readouterr().out.splitlines()
    assert about.startswith("a model, not a measurement") and "| H100, ms | H200, ms | 32x2, GB |" in head
    summary = json.loads(last)
    assert list(summary) == ["default", *options.CHOICES[1:]] and len(lines) == len(summary)
    plain, again = 3e3 / 132, 4e3 / 132
    assert [of["H200, ms"] for of in summary.values()] == pytest.approx([plain] * 4 + [again] * 2, abs=0.1)
    config = override(preset("quickstart"), ["recompute=true"])
    memory = predict_memory(config, elastic=Subnet(64, 3)).peak / 1e9
    assert summary["recompute=true"]["64x3, GB"] == round(memory, 1)
