"""Self-distillation over many prototypes: Sinkhorn scaling vectors, cross-entropies with dense soft targets.

    targets   q = softmax(t / tau_t + log_scale)                     t: teacher logits, kept once
    loss      sum over a row's targets of -<q, log softmax(x W^T / tau_s)>
    distill   -<softmax(x1 W^T / tau_s), log softmax(x2 W^T / tau_s)>, the first student being the teacher

Neither targets nor student logits need to exist: with Triton only teacher logits do, in the dtype they are
given in. `log_scale` is Sinkhorn-Knopp's column scaling (`sinkhorn_scaling`), or `-center / tau_t` for
centering, or zero.

Source: Sinkhorn-Knopp as in SwAV (Caron et al., 2020) and the official POA code, whose constants cancel;
losses of DINO (Caron et al., 2021), iBOT (Zhou et al., 2022) and POA (Zhang et al., ECCV 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elastic_kernels import dispatch, validate

Reduce = Callable[[Tensor, Literal["max", "sum"]], object]


@torch.no_grad()
def sinkhorn_scaling(
    logits: Sequence[Tensor], temperature: float, iterations: int = 3, reduce: Reduce | None = None
) -> list[Tensor]:
    """Find vectors with which `softmax(t / temperature + log_u)` uses every prototype equally.

    The iterations of Sinkhorn-Knopp alternate `log u_k = -lse_rows(S + log v)` and
    `log v_b = -lse_k(S + log u)`, `S = t / temperature`, in the log domain, where nothing overflows.

    Args:
        logits: teacher logits `[rows_i, prototypes_i]` of each problem, floating point; rows may be none.
        temperature: of the teacher.
        iterations: how often both directions are normalised.
        reduce: `reduce(tensor, "max" or "sum")` over all processes, in place: a maximum at the beginning,
            then a sum in every iteration, each of one buffer for all problems. None: the rows here are all
            there are.

    Returns:
        float32 `[prototypes_i]` (float64 for float64 logits) of each problem.

    Raises:
        ValueError: no iteration; logits that are no matrix, or of several devices.
        TypeError: of no floating dtype, or of several.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: exponentials are summed in fp32, over processes in float64. A prototype that is farther than 700
    below every row's others moves by 700 an iteration. Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import sinkhorn_scaling
        >>> t = torch.randn(6, 10)
        >>> (log_u,) = sinkhorn_scaling([t], 0.1)
        >>> log_u.shape
        torch.Size([10])
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn_scaling: expected at least 1 iteration, got {iterations}")
    if not logits:
        return []
    for t in logits:
        if t.dim() != 2:
            raise ValueError(f"sinkhorn_scaling: expected logits [rows, prototypes], got {tuple(t.shape)}")
    validate.operands("sinkhorn_scaling", **{f"logits {i}": t for i, t in enumerate(logits)})
    passes = _passes(list(logits), temperature)
    log_u, lse = _over_processes(passes, *passes.columns(None), None, reduce)
    for _ in range(iterations - 1):
        log_u, lse = _over_processes(passes, *passes.columns(passes.rows(log_u)), lse, reduce)
    return list(log_u.split([t.shape[1] for t in logits]))


class _Passes(NamedTuple):
    """The passes over all problems, whose vectors lie one after the other.

    Attributes:
        columns: of log v or None the maximum and the sum of exponentials of each column.
        rows: log v of each row, of log u.
        total: maximum, sum -> sum relative to common numbers, float64.
        scaling: total, common numbers -> log u, and minus log u.
    """

    columns: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    rows: Callable[[Tensor], Tensor]
    total: Callable[[Tensor, Tensor, Tensor], Tensor]
    scaling: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _passes(logits: list[Tensor], tau: float) -> _Passes:
    if dispatch.choose("sinkhorn_scaling", logits[0]).backend == "triton":
        import elastic_kernels.triton_ops.sinkhorn  # noqa: F401, registers the operators
        from elastic_kernels.triton_ops.registration import ops

        logits = [t if t.stride(-1) == 1 else t.contiguous() for t in logits]
        table = ops.sinkhorn_table(logits)
        return _Passes(
            lambda v: ops.sinkhorn_columns(logits, table, v, tau),
            lambda u: ops.sinkhorn_rows(logits, table, u, tau),
            ops.sinkhorn_total,
            ops.sinkhorn_scaling,
        )
    scores = [t.to(torch.promote_types(t.dtype, torch.float32)) / tau for t in logits]
    (heights, widths) = ([t.shape[d] for t in logits] for d in range(2))

    def columns(log_v: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = [None] * len(scores) if log_v is None else log_v.split(heights)
        sums = [_column_sums(s, v) for s, v in zip(scores, parts, strict=True)]
        return torch.cat([m for m, _ in sums]), torch.cat([z for _, z in sums])

    def rows(log_u: Tensor) -> Tensor:
        parts = zip(scores, log_u.split(widths), strict=True)
        return torch.cat([-torch.logsumexp(s + u, dim=1) for s, u in parts])

    return _Passes(columns, rows, _total, _scaling)


def _column_sums(scores: Tensor, log_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maximum of each column, and the sum of exponentials relative to it."""
    shifted = scores if log_v is None else scores + log_v.unsqueeze(1)
    if not len(shifted):
        return shifted.new_full((shifted.shape[1],), -torch.inf), shifted.new_zeros(shifted.shape[1])
    largest = shifted.amax(0)
    return largest, (shifted - largest).exp().sum(0)


def _over_processes(
    passes: _Passes, largest: Tensor, sums: Tensor, common: Tensor | None, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """Minus log-sum-exps of all columns over all processes, and those themselves.

    The sums of processes must be relative to the same numbers. At first these are the common maxima. Later
    they are `-log_u` of the iteration before: `log v_b = -lse(S_b + log u) <= -(S_bk + log u_k)`, so that no
    `S_bk + log v_b` is larger, and no maximum has to be asked for.
    """
    if common is None:
        common = largest.clone()
        if reduce is not None:
            reduce(common, "max")
    total = passes.total(largest, sums, common)
    if reduce is not None:
        reduce(total, "sum")
    return passes.scaling(total, common)


def _finite(common: Tensor) -> Tensor:
    return torch.where(common.isfinite(), common, 0.0)  # a problem without rows anywhere


def _total(largest: Tensor, sums: Tensor, common: Tensor) -> Tensor:
    return sums.double() * (largest - _finite(common)).double().exp()


def _scaling(total: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(torch.float64).tiny
    lse = (_finite(common) + total.clamp(min=tiny).log()).to(common.dtype)
    return -lse, lse


def prototype_cross_entropy(
    students: Sequence[Tensor],
    weight: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    log_scale: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float,
    operands: torch.dtype | None = None,
) -> list[Tensor]:
    """Compute cross-entropies of one or two students' rows with targets made of teacher logits, in one pass.

    Args:
        students: one or two `[rows, d]`, usually normalised, of the dtype of `weight`; with two, row i of
            both is the same token, and the second also learns from the first.
        weight: `[prototypes, d]`, prototypes as the rows; trained.
        teacher_logits: `[teacher_rows, prototypes]`, float32, float16 or bfloat16; not trained.
        log_scale: `[prototypes]`, float32; see above. Not trained.
        targets: int64 `[rows, 1 or 2]`: rows of `teacher_logits` that a row learns from, -1 for none. Two
            targets are summed. Where rows learn from logits of several kinds, `teacher_logits`, `log_scale`
            and `targets` are sequences, an entry for each part of the rows, one part after the other.
        student_temperature, teacher_temperature: divide the logits.
        operands: floating dtype to which students and weight are rounded for their products; default their
            own. Gradients have the dtype of the inputs and are never rounded to this one: with many
            prototypes most of them would underflow in float16.

    Returns:
        float32 `[rows]` for each student, and with two students the distillation loss `[rows]`, in which the
        first student is constant. Rows without a target have a loss of 0. To weight rows, multiply the
        result.

    Raises:
        ValueError: mismatched shapes or devices, or another number of students.
        TypeError: students and weight of different dtypes, `targets` of no int64, or `operands` of no
            floating dtype.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here.

    Numerics: products of the operands' dtype are summed in fp32 and not rounded before the softmax; gradients
    are fp32 sums. With Triton at most 256 MiB of student logits' gradients exist at once and no other tensor
    of rows x prototypes; the rest of the peak is a few fp32 tensors of the sizes of students and weight.
    Results repeat bitwise.

    Example:
        >>> import torch
        >>> from elastic_kernels import prototype_cross_entropy
        >>> x, W, t = torch.randn(4, 8), torch.randn(10, 8), torch.randn(3, 10)
        >>> index = torch.tensor([[0, -1], [1, -1], [2, -1], [0, 1]])
        >>> (loss,) = prototype_cross_entropy([x], W, t, torch.zeros(10), index, teacher_temperature=0.05)
        >>> loss.shape
        torch.Size([4])
    """
    op = "prototype_cross_entropy"
    operands = operands or weight.dtype
    given = [[x] if isinstance(x, Tensor) else list(x) for x in (teacher_logits, log_scale, targets)]
    if len({len(entries) for entries in given}) > 1 or not given[0]:
        lengths = ", ".join(str(len(entries)) for entries in given)
        raise ValueError(f"{op}: expected teacher_logits, log_scale and targets of each part, got {lengths}")
    parts = list(zip(*given, strict=True))
    _validate(op, students, weight, parts, operands)
    x1, x2 = students[0], students[1] if len(students) == 2 else None
    taus = (student_temperature, teacher_temperature)
    if dispatch.choose(op, x1, dtype=operands).backend == "triton":
        from elastic_kernels.triton_ops.prototype_losses import PrototypeLosses

        options = (*taus, operands, torch.is_grad_enabled())
        return list(PrototypeLosses.apply(x1, x2, weight, parts, *options))
    *rounded, matrix = [_rounded(x, operands) for x in (*students, weight)]
    counts = [len(index) for *_, index in parts]
    split = zip(*(x.split(counts) for x in rounded), strict=True)
    losses = [
        _reference(x, matrix, t, scale, index, *taus)
        for x, (t, scale, index) in zip(split, parts, strict=True)
    ]
    return list(torch.cat(losses, 1))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to a dtype but kept in its own; its gradient passes as it is, the sum is exact."""
    return x if x.dtype == dtype else x + (x.to(dtype).to(x.dtype) - x).detach()


def _reference(
    students: Sequence[Tensor],
    weight: Tensor,
    t: Tensor,
    log_scale: Tensor,
    targets: Tensor,
    tau_s: float,
    tau_t: float,
) -> Tensor:
    """The plain definition, `[1 or 3, rows]`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    q = torch.softmax(t.to(wide) / tau_t + log_scale, dim=-1).detach()
    taught = targets >= 0
    target = (q[targets.clamp(min=0)] * taught.unsqueeze(-1)).sum(1)
    columns = weight.to(wide).t()
    log_p = [torch.log_softmax(x.to(wide) @ columns / tau_s, dim=-1) for x in students]
    losses = [-(target * lp).sum(-1) for lp in log_p]
    if len(students) == 2:
        losses.append(-(log_p[0].detach().exp() * log_p[1]).sum(-1))
    return torch.stack(losses)


def _validate(
    op: str,
    students: Sequence[Tensor],
    weight: Tensor,
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    operands: torch.dtype,
) -> None:
    if len(students) not in (1, 2):
        raise ValueError(f"{op}: expected one or two students, got {len(students)}")
    validate.operands(op, **{f"student {i}": x for i, x in enumerate(students)}, weight=weight)
    rows, (prototypes, dim) = len(students[0]), weight.shape
    rest = rows - sum(len(index) for *_, index in parts[:-1])
    expected: list[tuple[str, Tensor, tuple[int, ...]]]
    expected = [(f"student {i}", x, (rows, dim)) for i, x in enumerate(students)]
    for i, (t, log_scale, targets) in enumerate(parts, 1):
        several = 2 if targets.shape[-1:] == (2,) else 1
        part_rows = max(rest, 0) if i == len(parts) else len(targets)
        expected += [
            ("teacher_logits", t, (len(t), prototypes)),
            ("log_scale", log_scale, (prototypes,)),
            ("targets", targets, (part_rows, several)),
        ]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: expected {name} {shape}, got {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{op}: expected {name} on {weight.device}, got {tensor.device}")
    for *_, targets in parts:
        if targets.dtype != torch.int64:
            raise TypeError(f"{op}: expected int64 targets, got {targets.dtype}")
    if not operands.is_floating_point:
        raise TypeError(f"{op}: expected operands of a floating dtype, got {operands}")
