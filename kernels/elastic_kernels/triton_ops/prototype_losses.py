"""The `autograd.Function` of cross-entropies over prototypes: rows of several parts, one weight.

Rows lie student by student; all are rounded at once, and so is the weight. Each part has a launch of its own
for the gradients of logits; products of all parts are one.
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
        counts, students = [len(index) for *_, index in parts], [x1] if x2 is None else [x1, x2]
        # Rounded in here, as autograd would round the gradients of tensors that were rounded outside.
        rows = torch.stack(students).to(operands)
        weight, saved = weight.to(operands).contiguous(), []
        losses = rows.new_empty(2 * len(students) - 1, len(x1), dtype=torch.float32)
        of_parts = zip(rows.split(counts, 1), losses.split(counts, 1), parts, strict=True)
        for x, losses_of_part, (t, log_u, index) in of_parts:
            arguments = unit_stride(t), log_u.float().contiguous(), index.contiguous()
            lse = ops.prototype_losses_fwd(x, weight, *arguments, tau_s, tau_t, losses_of_part, keep)
            saved += [*arguments, lse]
        ctx.save_for_backward(rows, weight, *saved)
        ctx.temperatures = tau_s, tau_t
        ctx.set_materialize_grads(False)
        return losses.unbind()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        learners = len(rows) - (len(rows) == 2 and grads[0] is None)
        grad = _stacked(grads[len(rows) - learners :], rows.shape[1], rows.device)
        dx = rows.new_empty(learners, *rows.shape[1:], dtype=torch.float32)
        dweight = (torch.empty_like if rows.shape[1] else torch.zeros_like)(weight, dtype=torch.float32)
        if rows.shape[1]:
            largest = torch.linalg.vector_norm(grad, float("inf"))
            parts = (list(saved[place::4]) for place in range(4))
            ops.prototype_losses_bwd(grad, rows, weight, *parts, largest, *ctx.temperatures, dx, dweight)
            torch._foreach_mul_([dx, dweight], largest)
        first, second = [*(None,) * (2 - learners), *dx] if len(rows) == 2 else [dx[0], None]
        return first, second, dweight, None, None, None, None, None


def _stacked(grads: Sequence[Tensor | None], rows: int, device: torch.device) -> Tensor:
    """fp32 `[losses, rows]`, zeros of losses that are not used."""
    given = [torch.zeros(rows, device=device) if g is None else g.float() for g in grads]
    return given[0].contiguous().unsqueeze(0) if len(given) == 1 else torch.stack(given)
