"""The reference of the one-pass optimiser, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_kernels import FusedAdamW
from helpers.kernels.optimizer_cases import STEPS, Setting, run


def test_equals_pytorchs_steps() -> None:
    got, _ = run(Setting(torch.float32), "reference")
    setting = Setting(torch.float32)
    optimizer = torch.optim.AdamW(setting.groups)
    for step, (clip, momentum) in enumerate(STEPS):
        setting.give_gradients(step, absent=(2, 4) if step == 1 else ())
        for part in setting.parts.values():
            torch.nn.utils.clip_grad_norm_(part, torch.inf if clip is None else clip)
        optimizer.step()
        if momentum is not None:
            for p, a in setting.averages.items():
                a.lerp_(p.detach(), 1 - momentum)
    for n, p in enumerate(setting.params):
        torch.testing.assert_close(got[f"parameter {n}"], p.detach(), rtol=0, atol=0)
    for n, a in enumerate(setting.averages.values()):
        torch.testing.assert_close(got[f"average {n}"], a, rtol=0, atol=0)


def test_closures() -> None:
    layer = nn.Linear(3, 2)
    optimizer = FusedAdamW(layer.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_a_gradient_that_is_no_number_changes_no_weight() -> None:
    setting = Setting(torch.float32)
    optimizer = setting.optimizer()
    setting.give_gradients(0)
    setting.params[1].grad.fill_(torch.nan)
    before = [p.detach().clone() for p in setting.params]
    optimizer.step(max_norm=1.0, momentum=0.5)
    assert not optimizer.finite and not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(setting.params, before, strict=True))


def _refused(**options) -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    FusedAdamW([a, b], **{name: make(a, b) for name, make in options.items()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"parts": lambda a, b: {"one": [a]}},
            ValueError,
            "every one of 2 parameters in one part, got 1 in one 1",
        ),
        ({"parts": lambda a, b: {"one": [a, b], "two": [b]}}, ValueError, "got 3 in one 2, two 1"),
        ({"averages": lambda a, b: {a: torch.zeros(4)}}, ValueError, r"average \(3,\) on cpu, got \(4,\)"),
        ({"averages": lambda a, b: {a: torch.zeros(3).half()}}, TypeError, "average of torch.float32, got"),
        ({"averages": lambda a, b: {torch.zeros(3): a}}, ValueError, "averages of its parameters"),
    ],
)
def test_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _refused(**options)


def test_a_group_that_comes_later_is_refused() -> None:
    optimizer = FusedAdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(RuntimeError, match="all parameters at construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
