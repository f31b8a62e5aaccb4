"""The Triton attention under Triton's interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import elastic_kernels.triton_ops.attention  # noqa: F401, registers the operators
from elastic_kernels import packed_attention
from helpers.kernels.attention_cases import PARTIAL_DIMS, Groups, assert_accurate, run
from helpers.kernels.numerics import DTYPES, draw, opcheck

# By code path: one row, both sides of every class edge and tile edge, primes, several groups, empty ones.
CASES: dict[str, Groups] = {
    "one-row": [(1, 1)],
    "two-classes": [(2, 37), (3, 5)],
    "edge-64": [(1, 64), (1, 65)],
    "edge-128": [(1, 128), (1, 129)],
    "197": [(1, 197)],
    "edge-256": [(1, 256), (1, 257)],
    "empty-group": [(0, 9), (2, 3)],
    "no-rows": [(0, 9)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "dim"),
    [(case, 16) for case in CASES]
    + [("two-classes", 32), ("197", 64), ("edge-64", 128), ("edge-256", 64), ("edge-256", 24)]
    + [("two-classes", dim) for dim in PARTIAL_DIMS],
)
def test_forward_and_gradient(case: str, dim: int, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dim, dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "dim"), [((1, 66, 0, 5), 16), ((3, 41), 48), ((0, 0), 16)], ids=str)
def test_sequences_that_begin_at_offsets(lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    assert_accurate([(1, length) for length in lengths], dim, dtype, "triton", by_offsets=True)


@pytest.mark.parametrize("absent", [False, True])
def test_long_sequences_take_several_programs(absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_kernels.triton_ops.attention, "LONGEST_OF_ONE_PROGRAM", 64)
    assert_accurate([(2, 9), (1, 70)], 16, torch.float32, "triton", absent=absent)


@pytest.mark.parametrize("by_offsets", [False, True])
def test_nothing_is_read_of_absent_heads(by_offsets: bool) -> None:
    """Of short sequences, of some longer than a tile, and of none that end the batch."""
    case = [(2, 5), (1, 70), (1, 3), (2, 0)]
    assert_accurate(case, 16, torch.float16, "triton", by_offsets=by_offsets, absent=True)


@pytest.mark.parametrize("layout", ["projections-first", "heads-last", "offset"])
def test_strided_inputs(layout: str) -> None:
    groups, contiguous = [(2, 5), (1, 3)], draw(13, 3, 2, 16).float()
    qkv = {
        "projections-first": contiguous.transpose(0, 1).contiguous().transpose(0, 1),
        "heads-last": contiguous.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.cat([contiguous, contiguous])[13:],
    }[layout]
    dout = draw(13, 32, seed=1).float()
    for a, b in zip(run(qkv, groups, dout, "triton"), run(contiguous, groups, dout, "triton"), strict=True):
        assert torch.equal(a, b)


def test_expanded_and_transposed_upstream_gradients() -> None:
    groups, qkv = [(2, 5)], draw(10, 3, 2, 16).float()
    ones = torch.ones(1, 1).expand(10, 32)
    transposed = draw(32, 10, seed=1).float().t()
    for dout in (ones, transposed):
        for a, b in zip(run(qkv, groups, dout, "triton"), run(qkv, groups, dout, "reference"), strict=True):
            torch.testing.assert_close(a, b)


def test_repeats_bitwise() -> None:
    groups, qkv, dout = [(1, 70)], draw(70, 3, 2, 16).half(), draw(70, 32, seed=1).half()
    first, second = (run(qkv, groups, dout, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_registered_operators() -> None:
    ops = torch.ops.elastic_kernels
    qkv, flat, offsets = draw(13, 3, 2, 16).float(), [2, 5, 1, 3], torch.tensor([0, 5, 13])
    active = torch.tensor([1] * 5 + [2] * 8)
    out, lse = ops.attention_fwd(qkv, flat)
    saved = (out, lse, torch.ones_like(out))
    opcheck(
        (ops.attention_fwd, (qkv, flat)),
        (ops.attention_fwd, (qkv, flat, active, False)),
        (ops.attention_bwd, (qkv, *saved, flat, False, active)),
        (ops.attention_bwd, (qkv, *saved, flat, True)),
        (ops.attention_offsets_fwd, (qkv, offsets)),
        (ops.attention_offsets_fwd, (qkv, offsets, active, False)),
        (ops.attention_offsets_bwd, (qkv, offsets, *saved, active)),
    )


def test_recomputed_equals_stored() -> None:
    qkv = draw(10, 3, 2, 16).float().requires_grad_()
    (stored,) = torch.autograd.grad(packed_attention(qkv, [(2, 5)]).sin().sum(), qkv)
    again = checkpoint(packed_attention, qkv, [(2, 5)], use_reentrant=False)
    (recomputed,) = torch.autograd.grad(again.sin().sum(), qkv)
    assert torch.equal(stored, recomputed)


@pytest.mark.parametrize(
    ("qkv", "groups", "message"),
    [
        (torch.zeros(4, 3, 2, 136), [(1, 4)], "head_dim up to 128, got 136"),
        (torch.zeros(4097, 3, 1, 16), [(1, 4097)], "lengths up to 4096, got 4097"),
        (torch.zeros(4, 3, 2, 16, dtype=torch.float64), [(1, 4)], "got torch.float64"),
    ],
)
def test_what_the_kernel_cannot_take_is_an_error_when_it_is_forced(
    qkv: Tensor, groups: Groups, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        packed_attention(qkv, groups)
