"""Constant tensors that operators keep between calls."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic_kernels import backend, relative_position_bias, window_attention


def shifted(training: bool) -> torch.Tensor:
    """Windowed attention of its own sizes, so that no other test has made the constants."""
    qkv = torch.randn(2 * 9 * 10, 3, 2, 8, requires_grad=training)
    table = torch.randn(81, 2, requires_grad=training)
    pad = torch.zeros(3, 2, 8)
    maps = [(2, 9, 10)]
    with backend("reference"):
        return window_attention(qkv, relative_position_bias(table, 5), pad, maps, window=5, shift=2)


def test_constants_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        shifted(training=False)
    shifted(training=True).sum().backward()


def test_constants_made_under_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode():
        shifted(training=False)
    assert shifted(training=False).isfinite().all()
