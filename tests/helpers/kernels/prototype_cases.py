"""Inputs and truth of the tests of prototype losses and Sinkhorn, interpreted and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kernels import backend, prototype_cross_entropy, sinkhorn_scaling
from helpers.kernels.numerics import assert_as_good_as_torch, draw

TAU_S, TAU_T = 0.1, 0.04


@dataclass(frozen=True)
class Case:
    """Sizes; a row has so many `targets` at most, and `spread` multiplies the teacher's logits, which lie
    within +-1 as those of trained heads."""

    rows: int
    prototypes: int
    dim: int
    teacher_rows: int = 5
    students: int = 2
    targets: int = 2
    spread: float = 1.0

    def inputs(self, dtype: torch.dtype, teacher_dtype: torch.dtype) -> dict[str, Tensor]:
        """Rows without a target, with one and with two are all there."""
        generator = torch.Generator().manual_seed(7)
        targets = torch.randint(-1, self.teacher_rows, (self.rows, self.targets), generator=generator)
        unit = [F.normalize(draw(self.rows, self.dim, seed=n), dim=1).to(dtype) for n in range(self.students)]
        teacher = self.spread * draw(self.teacher_rows, self.prototypes, seed=3).tanh()
        return {
            **{f"x{n}": x for n, x in enumerate(unit)},
            "weight": F.normalize(draw(self.prototypes, self.dim, seed=2), dim=1).to(dtype),
            "teacher": teacher.to(teacher_dtype),
            "log_scale": draw(self.prototypes, seed=4).float(),
            "targets": targets,
        }


def run(
    inputs: dict[str, Any],
    name: str,
    operands: torch.dtype | None = None,
    upstream: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses and gradients on a backend, for given upstream gradients or random ones of realistic size."""
    students = [inputs[n].detach().requires_grad_() for n in ("x0", "x1") if n in inputs]
    weight = inputs["weight"].detach().requires_grad_()
    with backend(name):
        losses = prototype_cross_entropy(
            students, weight, inputs["teacher"], inputs["log_scale"], inputs["targets"],
            student_temperature=TAU_S, teacher_temperature=TAU_T, operands=operands,
        )  # fmt: skip
        upstream = upstream or [1e-4 * draw(len(x), seed=9 + i).to(x) for i, x in enumerate(losses)]
        grads = torch.autograd.grad(losses, [*students, weight], upstream)
    names = [f"dx{n}" for n in range(len(students))] + ["dweight"]
    return {f"loss {i}": x.detach() for i, x in enumerate(losses)} | dict(zip(names, grads, strict=True))


def assert_accurate(case: Case, dtype: torch.dtype, teacher_dtype: torch.dtype, device: str = "cpu") -> None:
    """Losses and gradients are as good as PyTorch's in the same dtypes, against float64."""
    inputs = {name: t.to(device) for name, t in case.inputs(dtype, teacher_dtype).items()}
    exact = {name: t if name == "targets" else t.double() for name, t in inputs.items()}
    truth = run(exact, "reference")
    ours, torchs = (run(inputs, name) for name in ("triton", "reference"))
    for name, value in ours.items():
        assert value.dtype == torchs[name].dtype
        scale = 1 / max(float(truth[name].abs().max()), 1e-30) if truth[name].numel() else 1.0
        assert_as_good_as_torch(value * scale, torchs[name] * scale, truth[name] * scale, label=name)


def assert_gradients_are_not_rounded(case: Case, operands: torch.dtype, device: str = "cpu") -> None:
    """Rounded operands leave fp32 gradients, also where each is far below what a float16 can hold.

    The truth multiplies the same rounded operands in float64. Triton keeps the gradients of logits in the
    operands' dtype, relative to the largest upstream gradient, so its errors are a rounding of each.
    """
    inputs = {name: t.to(device) for name, t in case.inputs(torch.float32, torch.float16).items()}
    rounded = {n: t.to(operands).double() if n in ("x0", "x1", "weight") else t for n, t in inputs.items()}
    truth = run(rounded | {"log_scale": inputs["log_scale"].double()}, "reference")
    limits = {"reference": 1e-5, "triton": torch.finfo(operands).eps / 2}
    for name in limits if case.rows else ():
        for key, value in run(inputs, name, operands).items():
            assert value.dtype == torch.float32
            assert (value.double() - truth[key]).norm() <= limits[name] * truth[key].norm(), (name, key)


def assert_sinkhorn(t: Tensor, tau: float = TAU_T) -> None:
    """Scaling vectors of both backends equal those of the definition in float64."""
    scores = t.double() / tau
    log_v = torch.zeros_like(scores[:, 0])
    for _ in range(3):
        truth = -torch.logsumexp(scores + log_v.unsqueeze(1), dim=0)
        log_v = -torch.logsumexp(scores + truth, dim=1)
    for name in ("triton", "reference"):
        with backend(name):
            (ours,) = sinkhorn_scaling([t], tau)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)
