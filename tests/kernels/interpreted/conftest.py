"""Every test here runs the Triton kernels, under Triton's interpreter, into outputs full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from elastic_kernels import backend
from helpers.kernels.numerics import poison_outputs


@pytest.fixture(autouse=True)
def on_triton_with_poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_outputs(monkeypatch)
    with backend("triton"):
        yield


@pytest.fixture(autouse=True)
def launches_choose_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: every launch is inside a guard that made it the tensors'."""
    chosen: list[torch.device] = []
    run = GridExecutor.__call__

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor):
            self.device = tensor.device

        def __enter__(self) -> None:
            chosen.append(self.device)

        def __exit__(self, *error: object) -> None:
            chosen.pop()

    def launch(executor: GridExecutor, *args: Any, **options: Any) -> None:
        assert chosen, f"{executor.fn.__name__} is launched on whatever device is the current one"
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {chosen[-1]}
        run(executor, *args, **options)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
