"""The Triton prototype losses and Sinkhorn passes under Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_kernels.triton_ops.prototypes as kernels
from elastic_kernels import backend, prototype_cross_entropy, sinkhorn_scaling
from helpers.kernels.numerics import DTYPES, draw, opcheck
from helpers.kernels.prototype_cases import (
    TAU_S,
    TAU_T,
    Case,
    assert_accurate,
    assert_gradients_are_not_rounded,
    assert_sinkhorn,
    run,
)

# By code path: one row, none, primes, more rows and prototypes than a tile, several ranges, wide bottlenecks.
CASES = {
    "one-row": Case(1, 40, 16),
    "no-rows": Case(0, 40, 16),
    "prime": Case(17, 131, 24),
    "tiles": Case(65, 300, 16, targets=1),
    "wide": Case(3, 20, 70),
    "widest": Case(3, 20, 512),
    "one-student": Case(19, 70, 16, students=1),
    "one-teacher-row": Case(5, 33, 8, teacher_rows=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dtype, dtype)


def test_the_first_students_loss_is_not_used() -> None:
    """Gradients of the others are those for an upstream gradient of zeros."""
    inputs = CASES["prime"].inputs(torch.float32, torch.float32)
    (x1, x2), upstream = (inputs[n].requires_grad_() for n in ("x0", "x1")), 1e-4 * draw(3, 17).float()
    weight, rest = inputs["weight"].requires_grad_(), [inputs[n] for n in ("teacher", "log_scale", "targets")]
    upstream[0] = 0
    grads = []
    for first in (0, 1):
        with backend("triton"):
            losses = prototype_cross_entropy([x1, x2], weight, *rest, teacher_temperature=TAU_T)
        leaves = [x1, x2, weight]
        grads.append(torch.autograd.grad(losses[first:], leaves, list(upstream[first:]), allow_unused=True))
    assert not grads[0][0].any() and grads[1][0] is None
    for zeros, unused in zip(grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(unused, zeros, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("rows", [(19, 30), (0, 7), (5, 0)])
def test_parts_with_logits_of_their_own(rows: tuple[int, int]) -> None:
    """Losses and gradients are those of the parts, each alone."""
    cases = [Case(rows[0], 70, 16, targets=2), Case(rows[1], 70, 16, targets=1, teacher_rows=9)]
    parts = [case.inputs(torch.float32, torch.float32) for case in cases]
    parts[1]["weight"] = parts[0]["weight"]
    joint = {key: torch.cat([part[key] for part in parts]) for key in ("x0", "x1")}
    joint |= {key: [part[key] for part in parts] for key in ("teacher", "log_scale", "targets")}
    joint["weight"] = parts[0]["weight"]
    upstream = [1e-4 * draw(sum(rows), seed=i).float() for i in range(3)]
    outer = run(joint, "triton", upstream=upstream)
    split = zip(*(u.split(rows) for u in upstream), strict=True)
    inner = [run(part, "triton", upstream=list(u)) for part, u in zip(parts, split, strict=True)]
    for key, value in outer.items():
        of_parts = [found[key] for found in inner]
        expected = sum(of_parts) if key == "dweight" else torch.cat(of_parts)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-9)


def test_half_teacher_logits_beside_fp32_students() -> None:
    assert_accurate(CASES["prime"], torch.float32, torch.float16)


@pytest.mark.parametrize(("students", "prototypes"), [(1, 4_096), (2, 65_536)])
def test_gradients_of_fp32_inputs_are_not_rounded_to_half_operands(students: int, prototypes: int) -> None:
    """At the size of the paper's largest head they are near 1e-9."""
    assert_gradients_are_not_rounded(Case(12, prototypes, 32, students=students), torch.float16)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_logits_that_overflow_a_plain_exponential(teacher_dtype: torch.dtype) -> None:
    """Spread over +-10, the logits reach 250 after the teacher's temperature."""
    case = Case(9, 70, 16, spread=10.0)
    inputs = case.inputs(torch.float32, teacher_dtype)
    assert not (inputs["teacher"].float() / TAU_T).exp().isfinite().all()
    assert_accurate(case, torch.float32, teacher_dtype)
    assert_sinkhorn(inputs["teacher"])


def test_gradients_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few prototypes fit into the bound, the gradients are the same."""
    case = CASES["tiles"]
    inputs = case.inputs(torch.float32, torch.float32)
    whole = run(inputs, "triton")
    monkeypatch.setattr(kernels, "DZ_BYTES", 1)
    assert kernels.dz_prototypes(case.rows, 2, 4) == 128 < case.prototypes
    for name, value in run(inputs, "triton").items():
        torch.testing.assert_close(value, whole[name])


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that an operator made, and the most bytes that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.peak = 0, 0
        self.living: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                storage = tensor.untyped_storage()
                self.living[StorageWeakRef(storage)] = storage.nbytes()
        self.living = {ref: size for ref, size in self.living.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.living.values()))
        return out


def test_no_tensor_of_rows_times_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the bound of gradients of logits, and a few tensors of the sizes of students and weight."""
    case = Case(64, 1024, 8, teacher_rows=3)
    inputs = case.inputs(torch.float32, torch.float16)
    bound = 2 * 64 * 128 * 4
    monkeypatch.setattr(kernels, "DZ_BYTES", bound)
    with Allocations() as seen:
        run(inputs, "triton")
    assert 64 * 128 <= seen.elements < 64 * 1024
    few = 5 * 4 * (64 * 8 * 2 + 1024 * 8)
    assert bound < seen.peak < bound + few < 64 * 1024 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 40), (37, 131), (70, 260)])
def test_sinkhorn(rows: int, prototypes: int, dtype: torch.dtype) -> None:
    assert_sinkhorn(draw(rows, prototypes).tanh().to(dtype))


def test_sinkhorn_without_iterations_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        sinkhorn_scaling([torch.zeros(2, 3)], TAU_T, iterations=0)


def test_sinkhorn_of_no_rows_and_of_strided_logits() -> None:
    with_none = sinkhorn_scaling([torch.zeros(0, 7), draw(5, 9).float()], TAU_T)
    (alone,) = sinkhorn_scaling([draw(5, 9).float()], TAU_T)
    assert torch.equal(with_none[1], alone)
    wide = draw(5, 20).float()
    assert torch.equal(
        *(sinkhorn_scaling([t], TAU_T)[0] for t in (wide[:, 3:12], wide[:, 3:12].contiguous()))
    )


def test_sinkhorn_over_processes_is_that_of_the_union() -> None:
    """Each process's statistics are reduced as `torch.distributed` would."""
    parts = [draw(n, 30, seed=n).float() for n in (4, 0, 9)]
    (union,) = sinkhorn_scaling([torch.cat(parts)], TAU_T)
    pending: list[list[torch.Tensor]] = []

    class Stop(Exception):
        pass

    def recording(known: list[torch.Tensor]) -> Any:
        replies = iter(known)

        def reduce(tensor: torch.Tensor, how: str) -> None:
            reply = next(replies, None)
            if reply is None:
                pending[-1].append(tensor.clone())
                raise Stop
            tensor.copy_(reply)

        return reduce

    known: list[torch.Tensor] = []
    results = []
    for step in range(5):  # a maximum and three sums, then the end
        pending.append([])
        results = []
        for part in parts:
            try:
                results.append(sinkhorn_scaling([part], TAU_T, reduce=recording(known))[0])
            except Stop:
                continue
        if len(results) == len(parts):
            break
        stacked = torch.stack(pending[-1])
        known.append(stacked.amax(0) if step == 0 else stacked.sum(0))
    assert len(known) == 4
    for result in results:
        torch.testing.assert_close(result, union, rtol=1e-5, atol=1e-5)


def test_registered_operators() -> None:
    inputs = CASES["prime"].inputs(torch.float32, torch.float32)
    shared = [inputs[n] for n in ("weight", "teacher", "log_scale", "targets")]
    ops = torch.ops.elastic_kernels
    for students in (1, 2):
        x = torch.stack([inputs["x0"], inputs["x1"]][:students])
        losses = x.new_zeros(2 * students - 1, x.shape[1])
        arguments = (x, *shared, TAU_S, TAU_T, losses)
        for keep in (True, False):
            opcheck((ops.prototype_losses_fwd, (*arguments, keep)))
        lse = ops.prototype_losses_fwd(*arguments)
        results, parts = (x.new_zeros(x.shape), torch.zeros_like(shared[0])), (*shared[1:], lse.nan_to_num())
        saved = (x, shared[0], *([tensor] for tensor in parts), torch.ones(()))
        arguments = (torch.ones_like(losses), *saved, TAU_S, TAU_T, *results)
        opcheck((ops.prototype_losses_bwd, arguments))
    t, log_u = inputs["teacher"], inputs["log_scale"]
    table = ops.sinkhorn_table([t])
    opcheck((ops.sinkhorn_table, ([t],)))
    opcheck((ops.sinkhorn_rows, ([t], table, log_u, TAU_T)))
    opcheck((ops.sinkhorn_columns, ([t], table, None, TAU_T)))
    opcheck((ops.sinkhorn_columns, ([t], table, torch.zeros(5), TAU_T)))
    sums = ops.sinkhorn_columns([t], table, None, TAU_T)
    opcheck((ops.sinkhorn_total, (*sums, sums[0])))
    total = ops.sinkhorn_total(*sums, sums[0])
    opcheck((ops.sinkhorn_scaling, (total, sums[0])))


def test_repeats_bitwise() -> None:
    inputs = CASES["tiles"].inputs(torch.float16, torch.float16)
    first, second = (run(inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
