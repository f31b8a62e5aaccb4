"""Kernels of linear layers that tables of timed settings may choose, under Triton's interpreter."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime import _allocation

from elastic_kernels.dispatch import backend
from elastic_kernels.linear import elastic_linear_residual
from elastic_kernels.triton_ops import gemm, linear
from helpers.kernels.linear_cases import (
    Case,
    assert_accurate,
    assert_same_kept,
    with_persistent_programs,
)
from helpers.kernels.numerics import draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_persistent_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes several tiles; rows that descriptors do not take are left to the other kernel."""
    tile = {"block_m": 16, "block_n": 64, "block_k": 16, "warps": 4, "stages": 1}
    launches = with_persistent_programs(monkeypatch, **tile, persistent=1)
    for form in ("residual-gamma", "mlp-half", "attention-half"):
        assert_accurate(Case(70, 144, 144, kept=33), form, dtype)
    for activation in ("gelu", "silu", "gelu_tanh"):
        assert_accurate(Case(70, 136, 136, activation=activation), "mlp", dtype)
        assert_same_kept(Case(70, 136, 136, activation=activation), "mlp", dtype)
    assert {(4, False), (4, True)} <= set(launches)
    assert _allocation._allocator.get() is _allocation._NULL_ALLOCATOR  # the program's
    launches.clear()
    for form in ("residual-gamma", "mlp"):
        assert_accurate(Case(17, 150, 150, spare=3), form, dtype)
    assert not launches


def test_layer_scale_goes_back_without_persistent_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they load dy as it is."""
    tile = {"block_m": 16, "block_n": 64, "block_k": 16, "warps": 4, "stages": 1}
    launches = with_persistent_programs(monkeypatch, **tile, persistent=1)
    assert_accurate(Case(70, 144, 144), "mlp-half", torch.float16)
    assert (4, False) in launches and not any(backward for _, backward in launches)


def gemm_add(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, bias: Tensor | None, *, alpha: float, tuned: bool
) -> None:
    """As QuACK's, which adds to `out` after rounding where `c` is the same object."""
    assert c is not out and not tuned
    out.copy_(c.float() + alpha * (a.float() @ b.float()) + (0 if bias is None else bias.float()))


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """QuACK, chosen for whatever it may be chosen for."""
    called = mock.Mock(side_effect=gemm_add)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", SimpleNamespace(gemm_add=called))
    others = linear.config_for
    monkeypatch.setattr(
        linear, "config_for", lambda form, *of: gemm.QUACK if form == "residual_plain" else others(form, *of)
    )
    return called


def test_quack_adds_whole_rows_that_nothing_scales(quack: mock.Mock) -> None:
    """Into a new tensor and in place; what it cannot do, or not load, is left to Triton's kernel."""
    for case, form, calls in [
        (Case(33, 48, 40), "residual", 1),
        (Case(33, 48, 40), "residual-gamma", 0),
        (Case(33, 48, 40, kept=9), "residual", 0),
        (Case(17, 50, 50, spare=3), "residual", 0),
    ]:
        quack.reset_mock()
        assert_accurate(case, form, torch.float16)
        assert quack.call_count == calls, (case, form)
    x, weight, bias, stream = (
        draw(*shape, seed=seed).half() for seed, shape in enumerate([(9, 40), (64, 64), (64,), (9, 48)])
    )
    stream = stream.float()
    with backend("triton"):
        expected = elastic_linear_residual(x, weight, bias, stream, scale=1.0)
        linear.linear_residual_(x, weight[None, :48, :40], bias[None, :48], stream, None, None, None, 1.0)
    assert quack.call_count == 2 and torch.equal(stream, expected)


def test_quack_of_the_package_takes_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = pytest.importorskip("quack.gemm_interface", reason="quack-kernels is not installed")
    checked = mock.create_autospec(interface.gemm_add)
    monkeypatch.setattr(interface, "gemm_add", checked)
    x, weight, bias, stream = (draw(*shape).half() for shape in [(9, 40), (48, 40), (1, 48), (9, 48)])
    gemm.quack_residual(stream, x, weight, bias, stream, 0.5)
    assert checked.call_args.kwargs == {"alpha": 0.5, "tuned": False}
    assert checked.call_args.args[4].shape == (48,)
