"""The `autograd.Function` of cross-entropies over prototypes: rows of several parts, one weight.

Rows lie part by part, and in each student by student; all are rounded at once, and so is the weight, whose
gradient the parts add to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.prototypes import DZ_SCALE
from elastic_kernels.triton_ops.registration import first_order, ops

Part = tuple[Tensor, Tensor, Tensor]
"""Teacher logits, log u and index of consecutive rows."""


class PrototypeLosses(torch.autograd.Function):
    """The losses of each row, `[1 or 3, rows]`; outside of the registered operators: less host time."""

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
    ) -> Tensor:
        keep = trains and any(ctx.needs_input_grad)
        students, counts = [x for x in (x1, x2) if x is not None], [len(index) for *_, index in parts]
        # Rounded in here, as autograd would round the gradients of tensors that were rounded outside.
        split = zip(*(x.split(counts) for x in students), strict=True)
        rows = torch.cat([x for part in split for x in part]).to(operands)
        weight, losses, saved = weight.to(operands).contiguous(), [], []
        for x, (t, log_u, index) in zip(_by_part(rows, counts, len(students)), parts, strict=True):
            arguments = unit_stride(t), log_u.float().contiguous(), index.contiguous()
            loss, lse = ops.prototype_losses_fwd(x, weight, *arguments, tau_s, tau_t, keep)
            losses.append(loss)
            saved += [*arguments, lse]
        ctx.save_for_backward(rows, weight, *saved)
        ctx.temperatures, ctx.counts, ctx.students = (tau_s, tau_t), counts, len(students)
        return losses[0] if len(losses) == 1 else torch.cat(losses, 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        grad, students = grad.float(), ctx.students
        largest = torch.linalg.vector_norm(grad, float("inf")) if len(rows) else grad.new_ones(())
        dx, dweight = (x.new_empty(x.shape, dtype=torch.float32) for x in (rows, weight))
        written = False
        parts = zip(
            _by_part(rows, ctx.counts, students),
            _by_part(dx, ctx.counts, students),
            grad.split(ctx.counts, 1),
            strict=True,
        )
        for number, (x, dx_part, g) in enumerate(parts):
            if not x.shape[1]:
                continue
            arguments = (*saved[4 * number : 4 * number + 4], largest, *ctx.temperatures)
            ops.prototype_losses_bwd(
                g.contiguous(), x, weight, *arguments, dx_part.flatten(0, 1), dweight, written
            )
            written = True
        if not written:
            dweight.zero_()
        torch._foreach_mul_([dx, dweight], largest / DZ_SCALE)
        of_students = zip(*_by_part(dx, ctx.counts, students), strict=True)
        first, *second = [part[0] if len(part) == 1 else torch.cat(part) for part in of_students]
        return first, second[0] if second else None, dweight, None, None, None, None, None


def _by_part(rows: Tensor, counts: list[int], students: int) -> list[Tensor]:
    """Views `[students, rows, dim]` of rows that lie part by part, and in each student by student."""
    parts = rows.split([students * count for count in counts])
    return [part.unflatten(0, (students, count)) for part, count in zip(parts, counts, strict=True)]
