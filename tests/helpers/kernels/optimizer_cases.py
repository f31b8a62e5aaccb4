"""Optimiser steps on a small network, in float64, as PyTorch takes them, and fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic_kernels import FusedAdamW, backend, working_weights
from helpers.kernels.numerics import DTYPES, assert_as_good_as_torch, draw

# Of a step: clip norm, and momentum of the averages.
STEPS: tuple[tuple[float | None, float | None], ...] = ((0.5, 0.9), (None, 0.99), (2.0, 0.0), (0.5, None))
HALF = DTYPES[-1]
SIZES = ((70, 136), (1,), (8192,), (3, 5, 7), (33,), (257, 96))  # less than a chunk, one, and several


class Setting:
    """Parameters in two groups and two parts, crosswise, most with an average; all values seeded."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu"):
        self.params = [nn.Parameter(draw(*s, seed=n).to(device, dtype)) for n, s in enumerate(SIZES)]
        averages = [draw(*s, seed=20 + n).to(device, dtype) for n, s in enumerate(SIZES)]
        self.averages: dict[Tensor, Tensor] = dict(zip(self.params[:5], averages, strict=False))
        self.groups = [
            {"params": self.params[::2], "lr": 2e-3, "weight_decay": 0.3},
            {"params": self.params[1::2], "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6},
        ]
        self.parts = {"first": self.params[:3], "second": self.params[3:]}

    def give_gradients(self, step: int, absent: Sequence[int] = ()) -> None:
        for n, p in enumerate(self.params):
            grad = 0.01 * draw(*p.shape, seed=100 * step + n) * 10.0 ** (n - 3)
            p.grad = None if n in absent else grad.to(p)

    def optimizer(self) -> FusedAdamW:
        return FusedAdamW(self.groups, parts=self.parts, averages=self.averages)

    def results(self, optimizer: FusedAdamW) -> dict[str, Tensor]:
        named = {f"parameter {n}": p for n, p in enumerate(self.params)}
        named |= {f"average {n}": a for n, a in enumerate(self.averages.values())}
        for n, p in enumerate(self.params):
            named |= {f"{name} {n}": value for name, value in optimizer.state[p].items()}
        return {name: value.detach().clone() for name, value in named.items()}


def run(setting: Setting, name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Some steps, in one of which two tensors have no gradient: results, and the norms of each step."""
    optimizer, norms = setting.optimizer(), []
    copies = working_weights([*setting.params[1:], *list(setting.averages.values())[:4]], HALF)
    with backend(name), optimizer.writing(copies):
        for step, (clip, momentum) in enumerate(STEPS):
            setting.give_gradients(step, absent=(2, 4) if step == 1 else ())
            optimizer.step(max_norm=clip, momentum=momentum)
            assert optimizer.finite
            norms.append(optimizer.norms)
            with copies:
                for source, copy in copies.places().items():
                    assert torch.equal(copy, source.to(HALF))
    return setting.results(optimizer), norms


def assert_accurate(device: str = "cpu") -> None:
    """As good as PyTorch's own AdamW, clipping and averaging, against float64."""
    ours, torchs = Setting(torch.float32, device), Setting(torch.float32, device)
    got, got_norms = run(ours, "triton")
    low, _ = run(torchs, "reference")
    truth, true_norms = run(Setting(torch.float64, device), "reference")
    for name, value in got.items():
        if name.startswith("step"):
            assert float(value) == float(truth[name])
            continue
        scale = 1 / float(truth[name].abs().max())
        assert_as_good_as_torch(value * scale, low[name] * scale, truth[name] * scale, label=name)
    for step, true_step in zip(got_norms, true_norms, strict=True):
        for part, norm in step.items():
            torch.testing.assert_close(norm.double(), true_step[part], rtol=1e-6, atol=0)


def assert_same_at_odd_addresses(device: str = "cpu") -> None:
    """Gradients in one buffer at odd offsets, as DDP's buckets have them."""
    plain, shifted = (Setting(torch.float32, device) for _ in range(2))
    for setting in (plain, shifted):
        setting.give_gradients(0)
    buffer = torch.zeros(1 + sum(p.numel() for p in shifted.params), device=device)
    start = 1
    for p in shifted.params:
        view = buffer[start : start + p.numel()].view_as(p)
        p.grad = view.copy_(p.grad)
        start += p.numel()
    assert shifted.params[0].grad.data_ptr() % 16
    results = []
    for setting in (plain, shifted):
        optimizer = setting.optimizer()
        with backend("triton"):
            optimizer.step(max_norm=0.1, momentum=0.5)
        results.append(setting.results(optimizer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
