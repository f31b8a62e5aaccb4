"""Kernels of the presets' steps compiled without a GPU: rules, the table, what is read from code."""

from __future__ import annotations

import dataclasses

import pytest
import triton

from benchmarks import kernel_report
from benchmarks.assembly import Compiled
from benchmarks.kernel_rules import COLUMNS, EXCUSES, Excuse, Row, complaints

VERSION, HEAD, *LINES = kernel_report.TABLE.read_text().splitlines()
COMMITTED = [Row.parse(line) for line in LINES]
OF_THIS_TRITON = pytest.mark.skipif(
    f"# Triton {triton.__version__}" != VERSION, reason=f"the committed table is of {VERSION[2:]}"
)


def test_the_table_keeps_the_rules() -> None:
    assert HEAD == COLUMNS
    assert [str(row) for row in COMMITTED] == LINES
    assert list(complaints(COMMITTED)) == []


@OF_THIS_TRITON
def test_the_table_has_what_the_presets_launch(cases: list[kernel_report.Case]) -> None:
    """On Hopper. After a change that is meant: `python -m benchmarks.kernel_report --write`."""
    assert [case.key for case in cases] == [row.key for row in COMMITTED if row.architecture == "sm_90"]


@OF_THIS_TRITON
def test_the_table_says_what_the_compiler_makes(cases: list[kernel_report.Case]) -> None:
    """Of every fourth kernel of one preset on one architecture."""
    run = kernel_report.Run("vit-l16", "bf16", "sm_90")
    built = [case.row() for case in [case for case in cases if case.run == run][::4]]
    assert built == [row for row in COMMITTED if (row.preset, row.precision, row.architecture) == run][::4]


GOOD = Row(
    "vit-l16", "bf16", "losses_fwd", "sm_90", "TWO BLOCK_M=64", "bf16*4 fp32", 4, 3,
    128, 0, 40_000, 4, 1.5, "bf16", "8 wgmma", 1, 1, "16..4", "4..4", 0, 999,
)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"spilled_bytes": 8}, "spills: 8 bytes"),
        ({"shared_bytes": 300_000}, "shared memory: 300000 bytes, the GPU has 232448"),
        ({"blocks_an_sm": 0}, "blocks: none fits"),
        ({"duplicates": 2}, "duplicated warps: 2 compute the same"),
        ({"narrow": 32}, "scalar accesses: 32 of less than 4 bytes"),
        ({"matrix_instructions": "64 mma"}, "matrix instructions: expected wgmma, got mma"),
        ({"operands": "fp32"}, "matrix instructions: expected -, got wgmma"),
    ],
)
def test_broken_rules_are_named(wrong: dict[str, object], complaint: str) -> None:
    assert not list(complaints([GOOD], excuses=()))
    bad = dataclasses.replace(GOOD, **wrong)
    (line,) = complaints([bad], excuses=())
    assert line.startswith(complaint) and "losses_fwd sm_90 TWO BLOCK_M=64" in line
    rule = complaint.partition(":")[0]
    assert not list(
        complaints([bad], [Excuse(rule, "losses_.*", "a reason", architectures="sm_90", forms="TWO")])
    )
    other = Excuse(rule, "losses_.*", "a reason", forms="BLOCK_M=128")
    assert list(complaints([bad], [other])) == [line, f"no row needs the excuse: {other}"]


def test_excuses_have_reasons() -> None:
    assert all(len(excuse.reason.split()) > 3 for excuse in EXCUSES)


PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd3 + 0 ], 0x10, %r8;
    @%p2 ld.global.b16 { %rs1 }, [ %rd4 + 0 ];
    st.global.b32 [ %rd5 + 0 ], { %r9 };
"""
SASS = """
.L_x_1:
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_2:
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0150*/               @P0 BRA `(.L_x_2) ;
        /*0160*/               @P1 BRA `(.L_x_1) ;
        /*0170*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_3:
        /*0180*/                   BRA `(.L_x_3);
"""
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 4], instrShape = [16, 8]}>
  %s = ttng.warp_group_dot %q, %k, %c : !a * !b -> tensor<64x64xf32, #mma>
  %o = tt.dot %p, %v, %d : tensor<32x32xbf16, #x> * tensor<32x64xbf16, #y> -> tensor<32x64xf32, #mma1>
"""


def test_what_is_read_from_code() -> None:
    code = Compiled(90, 8, 200, 0, 0, PTX, "", TTGIR, SASS)
    assert code.accesses == {"ld": {16: 2, 8: 1, 2: 1}, "st": {4: 1}}
    assert code.narrow == 1
    assert code.waits == 2  # of the inner loop
    assert code.duplicates == 2  # 8 warps of 16 rows on 64; 2 x 4 warps fit on 32 x 64
    assert code.blocks_per_processor == 1  # 8 x 32 x 200 registers
    assert Compiled(120, 4, 64, 0, 40_000, "").blocks_per_processor == 2  # by 100 KB of shared memory
