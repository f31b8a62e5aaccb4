"""The `autograd.Function` of cross-entropies over prototypes: rows of several parts, one weight.

Rows lie part by part, and in each student by student; all are rounded at once, and so is the weight, whose
gradient the parts add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import elastic_kernels.triton_ops.prototypes  # noqa: F401, registers its operators
from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.registration import first_order, ops

Part = tuple[Tensor, Tensor, Tensor]
"""Teacher logits, log u and index of consecutive rows."""


class PrototypeLosses(torch.autograd.Function):
    """The losses of each row, one or three `[rows]`; outside of the registered operators: less host time."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor | None,
        weight: Tensor,
        parts: list[Part],
        tau_s: float,
        tau_t: float,
        operands: torch.dtype,
        trains: bool,
    ) -> tuple[Tensor, ...]:
        keep = trains and any(ctx.needs_input_grad)
        counts, students = [len(index) for *_, index in parts], 1 if x2 is None else 2
        # Rounded in here, as autograd would round the gradients of tensors that were rounded outside.
        if x2 is None:
            rows = x1.to(operands).contiguous()
        else:
            split = zip(x1.split(counts), x2.split(counts), strict=True)
            rows = torch.cat([x for part in split for x in part]).to(operands)
        weight, saved = weight.to(operands).contiguous(), []
        losses = rows.new_empty(2 * students - 1, len(x1), dtype=torch.float32)
        of_parts = zip(_by_part(rows, counts, students), losses.split(counts, 1), parts, strict=True)
        for x, losses_of_part, (t, log_u, index) in of_parts:
            arguments = unit_stride(t), log_u.float().contiguous(), index.contiguous()
            lse = ops.prototype_losses_fwd(x, weight, *arguments, tau_s, tau_t, losses_of_part, keep)
            saved += [*arguments, lse]
        ctx.save_for_backward(rows, weight, *saved)
        ctx.temperatures, ctx.counts, ctx.students = (tau_s, tau_t), counts, students
        ctx.set_materialize_grads(False)
        return losses.unbind()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        both = ctx.students == 2 and grads[0] is not None
        grad = _stacked(grads if both or ctx.students == 1 else grads[1:], sum(ctx.counts), rows.device)
        learners = 2 if both else 1
        largest = torch.linalg.vector_norm(grad, float("inf")) if len(rows) else grad.new_ones(())
        dx = rows.new_empty(learners * sum(ctx.counts), rows.shape[1], dtype=torch.float32)
        dweight, written = torch.empty_like(weight, dtype=torch.float32), False
        dx_parts = dx.split([learners * count for count in ctx.counts])
        parts = zip(
            _by_part(rows, ctx.counts, ctx.students), dx_parts, grad.split(ctx.counts, 1), strict=True
        )
        for number, (x, dx_part, g) in enumerate(parts):
            if not x.shape[1]:
                continue
            arguments = (*saved[4 * number : 4 * number + 4], largest, *ctx.temperatures)
            ops.prototype_losses_bwd(g, x, weight, *arguments, dx_part, dweight, written)
            written = True
        if not written:
            dweight.zero_()
        torch._foreach_mul_([dx, dweight], largest)
        rest = (dweight, None, None, None, None, None)
        if learners < ctx.students:
            return None, dx, *rest
        of_students = zip(*_by_part(dx, ctx.counts, learners), strict=True)
        first, *second = [dx] if learners == 1 else [torch.cat(part) for part in of_students]
        return first, second[0] if second else None, *rest


def _stacked(grads: Sequence[Tensor | None], rows: int, device: torch.device) -> Tensor:
    """fp32 `[losses, rows]`, zeros of losses that are not used."""
    given = [torch.zeros(rows, device=device) if g is None else g.float() for g in grads]
    return given[0].contiguous().unsqueeze(0) if len(given) == 1 else torch.stack(given)


def _by_part(rows: Tensor, counts: list[int], students: int) -> list[Tensor]:
    """Views `[students, rows, dim]` of rows that lie part by part, and in each student by student."""
    parts = rows.split([students * count for count in counts])
    return [part.unflatten(0, (students, count)) for part, count in zip(parts, counts, strict=True)]
